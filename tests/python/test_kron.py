"""FlatQuant's operator against float64: shapes, types, forms, clips, special rows, layouts; CPU and, -m gpu, CUDA."""

import numpy as np
import pytest
import torch
from cuda_tensors import DEVICES
from flatquant_cases import DTYPES, SHARE_OFF, SIDES, assert_close, codes_of, exact_transform, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpack
from kvpack import kron_quantize


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 21])
def test_every_shape_agrees_with_float64(device, dtype, tokens):
    budget = [0, 0]
    for name in SIDES:
        x, left, right = make_case(name, tokens, dtype, device)
        for output in ("int8", "packed", "pairs"):
            if x.shape[1] % {"int8": 1, "packed": 8, "pairs": 2}[output]:
                continue
            rows = kron_quantize(x, left, right, output=output)
            assert_close(rows, exact_transform(x, left, right), dtype, budget=budget)
    assert budget[0] <= SHARE_OFF[dtype] * budget[1], f"{budget[0]} of {budget[1]} codes are off by one"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clips_grids_and_diagonals_agree_with_float64(device, dtype):
    for name in ("896", "4096", "5120", "right alone", "left alone"):
        x, left, right = make_case(name, 19, dtype, device)
        diagonal = (torch.rand(x.shape[1]) + 0.5).to(dtype).to(device)
        y = exact_transform((x * diagonal).to(dtype), left, right)
        rows = kron_quantize(x, left, right, diagonal=diagonal, clip=(0.8, 0.6))
        assert_close(rows, y, dtype, high=0.8, low=0.6)
        rows = kron_quantize(x, left, right, diagonal=diagonal, clip=(0.9, 0.7), grid="affine")
        assert_close(rows, y, dtype, high=0.9, low=0.7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grid", ["symmetric", "affine"])
def test_forms_and_encodings_hold_the_same_codes(device, grid):
    x, left, right = make_case("5120", 7, torch.float16, device)
    plain = kron_quantize(x, left, right, output="int8", grid=grid)
    packed = kron_quantize(x, left, right, grid=grid)
    offset = kron_quantize(x, left, right, encoding="offset", grid=grid)
    pairs = kron_quantize(x, left, right, output="pairs", grid=grid)
    for rows in (packed, offset, pairs):
        assert torch.equal(codes_of(rows), codes_of(plain))
        assert torch.equal(rows.scales, plain.scales)
    assert torch.equal(packed.codes ^ torch.tensor(-0x77777778, dtype=torch.int32, device=device), offset.codes)
    assert torch.equal(packed.codes.view(torch.uint8), pairs.codes)


@pytest.mark.parametrize("device", DEVICES)
def test_several_clips_equal_several_calls(device):
    x, left, right = make_case("4096", 9, torch.bfloat16, device)
    for clips in ({"clip_ratio": [1.0, 0.9, 0.5]}, {"clip": [(1.0, 0.5), (0.25, 0.75)]}):
        together = kron_quantize(x, left, right, **clips)
        key = next(iter(clips))
        assert len(together) == len(clips[key])
        for rows, one in zip(together, clips[key], strict=True):
            alone = kron_quantize(x, left, right, **{key: one})
            assert torch.equal(rows.codes, alone.codes) and torch.equal(rows.scales, alone.scales)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("encoding", ["twos_complement", "offset"])
def test_rows_that_are_not_finite_touch_no_other(device, dtype, encoding):
    x, left, right = make_case("896", 40, dtype, device)
    clean = kron_quantize(x, left, right, encoding=encoding)
    x[3, 0], x[17, -1], x[39, 100] = float("nan"), float("inf"), -float("inf")
    rows = kron_quantize(x, left, right, encoding=encoding)
    broken = torch.zeros(40, dtype=torch.bool)
    broken[[3, 17, 39]] = True
    assert torch.equal(rows.scales.cpu().isnan().flatten(), broken)
    assert (codes_of(rows)[broken] == 0).all()
    assert torch.equal(rows.codes.cpu()[~broken], clean.codes.cpu()[~broken])
    assert torch.equal(rows.scales.cpu()[~broken], clean.scales.cpu()[~broken])


@pytest.mark.parametrize("device", DEVICES)
def test_zero_rows_have_scale_one_and_no_rows_are_fine(device):
    x, left, right = make_case("896", 4, torch.float32, device)
    x[2] = 0
    rows = kron_quantize(x, left, right)
    assert rows.scales[2].item() == 1.0 and (codes_of(rows)[2] == 0).all()
    nothing = kron_quantize(x[:0], left, right)
    assert nothing.codes.shape == (0, 112) and nothing.scales.shape == (0, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_leading_shape_and_stride_gives_the_same_rows(device, dtype):
    x, left, right = make_case("896", 24, dtype, device)
    expected = kron_quantize(x, left, right)
    wide = torch.full((24, 2 * 896 + 3), float("nan"), dtype=dtype, device=device)
    wide[:, 5 : 5 + 896] = x
    assert torch.equal(kron_quantize(wide[:, 5 : 5 + 896], left, right).codes, expected.codes)
    assert torch.equal(kron_quantize(x.T.contiguous().T, left, right).codes, expected.codes)
    deep = kron_quantize(x.view(2, 3, 4, 896), left, right)
    assert deep.codes.shape == (2, 3, 4, 112) and deep.scales.shape == (2, 3, 4, 1)
    assert torch.equal(deep.codes.view(24, 112), expected.codes)
    assert torch.equal(kron_quantize(x[7], left, right).codes, expected.codes[7])
    assert torch.equal(kron_quantize(x[::3], left, right).codes, expected.codes[::3])


@pytest.mark.parametrize("device", DEVICES)
def test_out_is_written_and_returned(device):
    x, left, right = make_case("896", 3, torch.float16, device)
    fresh = kron_quantize(x, left, right, clip_ratio=[1.0, 0.5], grid="affine")
    out = [kvpack.Int4Rows(*(torch.full_like(part, 3) for part in rows[:3]), rows.encoding) for rows in fresh]
    given = kron_quantize(x, left, right, clip_ratio=[1.0, 0.5], grid="affine", out=out)
    for rows, target, expected in zip(given, out, fresh, strict=True):
        assert rows.codes is target.codes
        assert torch.equal(target.codes, expected.codes) and torch.equal(target.zeros, expected.zeros)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_producers_equal_the_transform_of_what_they_produce(device, dtype):
    x, left, right = make_case("4096", 21, dtype, device)
    up = make_case("4096", 21, dtype, device)[0].flip(0).contiguous()
    weight = (torch.rand(4096) + 0.5).to(dtype).to(device)
    wide = x.double()
    normed = (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()).to(dtype)
    rows = kvpack.rmsnorm_kron_quantize(x, weight, left, right, epsilon=1e-5)
    assert_close(rows, exact_transform(normed, left, right), dtype)
    gated = (torch.nn.functional.silu(wide) * up.double()).to(dtype)
    rows = kvpack.silu_mul_kron_quantize(x, up, left, right)
    assert_close(rows, exact_transform(gated, left, right), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_way_back_restores_rows_up_to_quantising(device, dtype):
    x, left, right = make_case("896", 11, torch.float32, device)
    inverses = [torch.linalg.inv(side.double()).to(dtype) for side in (left, right)]
    diagonal = torch.rand(896, device=device) + 0.5
    rows = kron_quantize(x.to(dtype), left.to(dtype), right.to(dtype), diagonal=diagonal.to(dtype), grid="affine")
    y = kvpack.dequantize_int4(rows, dtype=dtype)
    assert y.dtype == dtype
    codes, zeros = codes_of(rows), rows.zeros.cpu()
    assert torch.equal(y.cpu(), ((codes.float() - zeros) * rows.scales.cpu()).to(dtype))
    back = kvpack.undo_transform(y, *inverses, diagonal=(1 / diagonal).to(dtype))
    exact = torch.kron(inverses[0], inverses[1]).cpu().double()
    expected = y.cpu().double() @ exact / diagonal.cpu().double()
    error = (back.cpu().double() - expected).norm() / expected.norm()
    assert error < {torch.float16: 2e-3, torch.float32: 1e-5}[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_linear_layer_is_exact(device, dtype, tokens):
    x, left, right = make_case("896", tokens, torch.float32, device)
    weight = torch.randn(100, 896, device=device)
    bias = torch.randn(100, device=device).to(dtype)
    for grid, forms in (("symmetric", ("packed", "int8")), ("affine", ("pairs", "packed"))):
        rows = kron_quantize(x, left, right, grid=grid, output=forms[0], clip_ratio=0.9)
        packed = kron_quantize(weight, output=forms[1], encoding="twos_complement" if forms[1] == "int8" else "offset")
        sums = (codes_of(rows) - (0 if rows.zeros is None else rows.zeros.cpu().long())) @ codes_of(packed).T
        factors = rows.scales.cpu() * packed.scales.cpu().T
        expected = (sums.float() * factors + bias.cpu().float()).to(dtype)
        actual = kvpack.linear_w4a4(rows, packed, bias)
        assert actual.dtype == dtype
        assert torch.equal(actual.cpu(), expected)
        assert torch.equal(kvpack.linear_w4a4(rows, packed, dtype=torch.float32).cpu(), sums.float() * factors)


@pytest.mark.parametrize("device", DEVICES)
def test_a_transformed_weight_keeps_the_product(device):
    # x W^T = (x (L kron R)) (W (L kron R)^-T)^T
    x, left, right = make_case("896", 5, torch.float32, device)
    weight = torch.randn(30, 896, device=device)
    inverses = [torch.linalg.inv(side.double()).float().T.contiguous() for side in (left, right)]
    moved = kvpack.undo_transform(weight, *inverses)
    product = exact_transform(x, left, right) @ moved.cpu().double().T
    exact = x.cpu().double() @ weight.cpu().double().T
    assert (product - exact).norm() / exact.norm() < 1e-3


def test_numpy_gives_the_bytes_of_torch():
    x, left, right = make_case("896", 6, torch.float32)
    expected = kron_quantize(x, left, right, grid="affine")
    rows = kron_quantize(x.numpy(), left.numpy(), right.numpy(), grid="affine")
    assert isinstance(rows.codes, np.ndarray) and rows.codes.dtype == np.int32
    assert np.array_equal(rows.codes, expected.codes.numpy()) and np.array_equal(rows.zeros, expected.zeros.numpy())
    assert np.array_equal(kvpack.dequantize_int4(rows), kvpack.dequantize_int4(expected).numpy())


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_sides_tokens_and_clips_agree_with_float64(data):
    rows, columns, tokens = (
        data.draw(st.integers(1, top), label=name) for name, top in (("M", 40), ("N", 40), ("T", 9))
    )
    n = rows * columns
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32), label="seed"))
    x = torch.randn(tokens, n, generator=generator)
    left, right = torch.randn(rows, rows, generator=generator), torch.randn(columns, columns, generator=generator)
    high, low = (data.draw(st.floats(0.05, 1.0), label=name) for name in ("high", "low"))
    grid = data.draw(st.sampled_from(["symmetric", "affine"]))
    output = data.draw(st.sampled_from([o for o, k in (("int8", 1), ("pairs", 2), ("packed", 8)) if n % k == 0]))
    rows4 = kron_quantize(x, left, right, clip=(high, low), grid=grid, output=output)
    assert_close(rows4, exact_transform(x, left, right), torch.float32, high=high, low=low)


def test_decompose_dim():
    sides = {4096: (64, 64), 5120: (64, 80), 8192: (64, 128), 11008: (86, 128), 14336: (112, 128), 28672: (128, 224)}
    for n, expected in {**sides, 896: (28, 32), 13824: (108, 128), 10: (2, 5), 1: (1, 1), 7: (1, 7)}.items():
        assert kvpack.get_decompose_dim(n) == expected
    with pytest.raises(ValueError, match="n is 0"):
        kvpack.get_decompose_dim(0)
