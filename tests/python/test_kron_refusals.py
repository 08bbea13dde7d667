"""What FlatQuant's operations refuse, with both values, and that nothing is written then; CPU and, -m gpu, CUDA."""

import pytest
import torch
from cuda_tensors import DEVICES, needs_gpu
from flatquant_cases import make_case

import kvpack
from kvpack import kron_quantize


@pytest.fixture(params=DEVICES)
def case(request):
    return make_case("4096", 3, torch.float32, request.param)


def refuse(error, match, *arguments, **settings):
    """Runs a call that must fail, with outputs that must stay as they are where the settings allow them."""
    with pytest.raises(error, match=match):
        kron_quantize(*arguments, **settings)


def test_sides_that_do_not_multiply_to_n(case):
    x, left, right = case
    refuse(ValueError, r"M\*N is 4096, but rows have n = 4032", x[:, :4032], left, right)
    refuse(ValueError, r"left is \[64, 64\], which does not divide n = 4095", x[:, :4095], left, output="int8")
    refuse(ValueError, "square", x, left[:32])


def test_rows_that_do_not_pack(case):
    x = case[0]
    refuse(ValueError, "n is 63; int32 codes need a multiple of 8", x[:, :63])
    refuse(ValueError, "n is 63; uint8 codes need a multiple of 2", x[:, :63], output="pairs")
    assert kron_quantize(x[:, :63], output="int8").codes.shape == (3, 63)


@pytest.mark.parametrize("clip", [0, -0.5, 1.5, float("nan"), float("inf")])
def test_clips_out_of_range(case, clip):
    refuse(ValueError, "above 0 and at most 1", *case, clip_ratio=clip)
    refuse(ValueError, r"clip_min is .*above 0 and at most 1", *case, clip=(1.0, clip))


def test_clips_that_are_no_clips(case):
    refuse(ValueError, "give one of the two", *case, clip_ratio=0.5, clip=(1.0, 1.0))
    refuse(ValueError, "expected pairs", *case, clip=[1.0, 1.0, 1.0])
    refuse(ValueError, "0 outputs; there must be 1 to 4", *case, clip_ratio=[])
    refuse(ValueError, "5 outputs; there must be 1 to 4", *case, clip_ratio=[1.0] * 5)


def test_words_out_of_their_sets(case):
    refuse(ValueError, "output is 'int4'; it is one of packed, pairs, int8", *case, output="int4")
    refuse(ValueError, "encoding is 'gray'", *case, encoding="gray")
    refuse(ValueError, "grid is 'round'", *case, grid="round")
    refuse(ValueError, "int8 codes, which hold q itself", *case, output="int8", encoding="offset")


def test_types_that_do_not_fit(case):
    x, left, right = case
    refuse(ValueError, "left is float16; expected float32", x, left.half(), right)
    refuse(ValueError, "x is float64; expected float16, bfloat16 or float32", x.double())
    refuse(TypeError, "element type", x.to(torch.complex64))
    refuse(TypeError, "must be a torch or numpy tensor", [1.0, 2.0])
    refuse(ValueError, r"diagonal has shape \[64\]; expected \[4096\]", x, left, right, diagonal=left[0])


def test_shapes_without_elements(case):
    x = case[0]
    refuse(ValueError, r"n at least 1", x[:, :0])
    refuse(ValueError, r"expected \[\.\., n\]", x[0, 0])


def test_out_that_does_not_fit_stays_as_it_is(case):
    x, left, right = case
    good = kron_quantize(x, left, right)
    before = good.codes.clone()
    refuse(ValueError, r"expected \(2, 512\)", x[:2], left, right, out=good)
    refuse(ValueError, "asked for int32 of encoding offset", x, left, right, encoding="offset", out=good)
    refuse(ValueError, "out holds 1 outputs; expected 2", x, left, right, clip_ratio=[1.0, 0.5], out=good)
    refuse(ValueError, "not contiguous", x, left, right, out=good._replace(codes=good.codes.T.contiguous().T))
    refuse(ValueError, "clip_max is 2", x, left, right, clip_ratio=2.0, out=good)
    refuse(ValueError, "overlaps", x, left, right, clip_ratio=[1.0, 0.5], out=[good, good])
    assert torch.equal(good.codes, before)


def test_readers_refuse_what_does_not_fit(case):
    rows = kron_quantize(*case)
    weight = kron_quantize(case[0][:, :64])
    with pytest.raises(ValueError, match="x has n = 4096 but weight has 64"):
        kvpack.linear_w4a4(rows, weight)
    with pytest.raises(ValueError, match="weight has zeros"):
        kvpack.linear_w4a4(rows, kron_quantize(*case, grid="affine"))
    with pytest.raises(TypeError, match=r"must be kvpack\.Int4Rows"):
        kvpack.linear_w4a4(rows.codes, weight)
    with pytest.raises(ValueError, match="out is float64"):
        kvpack.dequantize_int4(rows, dtype="float64")
    with pytest.raises(ValueError, match="bias is float32; expected float16"):
        kvpack.linear_w4a4(rows, rows, torch.zeros(3, device=rows.codes.device), dtype=torch.float16)
    with pytest.raises(ValueError, match="gate has shape"):
        kvpack.silu_mul_kron_quantize(case[0], case[0][:2])
    with pytest.raises(ValueError, match=r"weight has shape \[64\]"):
        kvpack.rmsnorm_kron_quantize(case[0], case[1][0])


@needs_gpu
def test_devices_that_differ():
    x, left, right = make_case("4096", 3, torch.float32, "cuda")
    refuse(ValueError, "left is on cpu; expected cuda:0", x, left.cpu(), right)
