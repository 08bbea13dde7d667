"""simulate_quantized and rotate on CUDA against the reference, bit for bit.

Codebooks, scales, calibrated ranges, groups, layouts, and the shapes at which another kernel takes over.
"""

import numpy as np
import pytest
import torch
from cuda_tensors import (
    AGAINST_REFERENCE,
    PADDED,
    PLAIN,
    SEED,
    STRIDED,
    Guarded,
    assert_same_bits,
    check_against_reference,
    fill,
    place,
)

from kvpack import codebook_ops, ops

pytestmark = AGAINST_REFERENCE

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
AXES = ["per_channel", "per_token"]


def codebook(bits: int) -> np.ndarray:
    """Uneven centroids in [-1, 1], some close to each other."""
    random = np.random.default_rng(SEED + bits)
    return np.unique(np.float32(np.tanh(random.normal(size=1 << bits))))


def calibrated(x: torch.Tensor, axis: str) -> dict:
    """Ranges that cut some elements off, one of them constant."""
    dim = 0 if axis == "per_channel" else 1
    low, high = x.float().amin(dim) * 0.7, x.float().amax(dim) * 0.7
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    high[0] = low[0]
    return dict(mode="calibrated", lower=low, upper=high)


SHAPES = {
    "one element": dict(shape=(1, 1)),
    "odd channels": dict(shape=(65, 3)),
    "one vector of 8": dict(shape=(65, 8)),
    "part of a warp": dict(shape=(70, 72)),
    "several tiles": dict(shape=(700, 320)),
    "rows of 1024": dict(shape=(67, 1024), protected_tokens=3),
    "rows of 2048": dict(shape=(33, 2048)),
    "rows of 4096": dict(shape=(9, 4096)),
    "rows of 5000": dict(shape=(9, 5000)),
    "groups of 8": dict(shape=(70, 320), group=8),
    "groups of 32": dict(shape=(101, 320), group=32, protected_tokens=5),
    "groups of 64": dict(shape=(201, 320), group=64),
    "groups of 128": dict(shape=(300, 1024), group=128, protected_tokens=130),
    "groups of 40": dict(shape=(100, 320), group=40),
    "groups of 300": dict(shape=(700, 600), group=300, protected_tokens=1),
    "causal": dict(shape=(200, 320), mode="causal", protected_tokens=2),
    "causal without a group": dict(shape=(63, 64), mode="causal"),
    "padded rows": dict(shape=(70, 72), layout=PADDED),
    "strided channels": dict(shape=(70, 72), layout=STRIDED),
}
METHODS = {
    "int": lambda x, axis: {},
    "int clamp": lambda x, axis: dict(offset="clamp"),
    "int outliers": lambda x, axis: dict(outlier_fraction=0.02),
    "nuq": lambda x, axis: dict(codebook=codebook(3)),
    "nuq outliers": lambda x, axis: dict(codebook=codebook(3), outlier_fraction=0.05, norm=(1.25, -0.01)),
    "nuq compat": lambda x, axis: dict(codebook=codebook(3), compat=True),
    "int compat outliers": lambda x, axis: dict(outlier_fraction=0.02, compat=True),
    "rms": lambda x, axis: dict(codebook=codebook(3) * 3, scale="rms"),
    "calibrated int": lambda x, axis: calibrated(x, axis),
    "calibrated int outliers": lambda x, axis: dict(outlier_fraction=0.01, **calibrated(x, axis)),
    "calibrated nuq": lambda x, axis: dict(codebook=codebook(3), **calibrated(x, axis)),
    "calibrated nuq compat": lambda x, axis: dict(
        codebook=codebook(3), outlier_fraction=0.01, compat=True, **calibrated(x, axis)
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_method_equals_the_reference_bit_for_bit(shape, method, axis, dtype):
    case = {"layout": PLAIN} | SHAPES[shape]
    x = fill("normal", *case.pop("shape"), dtype)
    options = METHODS[method](x, axis)
    if "mode" in case and "mode" in options:
        pytest.skip("one mode at a time")
    check_against_reference(codebook_ops.simulate_quantized, x, bits=3, axis=axis, **case, **options)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_every_number_of_bits_equals_the_reference(dtype, axis, bits):
    x = fill("normal", 130, 256, dtype)
    for options in (
        {},
        dict(codebook=codebook(bits)),
        dict(codebook=codebook_ops.nf_codebook(bits), outlier_fraction=0.01),
    ):
        check_against_reference(codebook_ops.simulate_quantized, x, bits=bits, axis=axis, **options)


KINDS = ["constant", "ties", "mostly ties", "positive", "drift", "denormal", "zeros", "huge", "sink"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_equals_the_reference(kind, method, axis, dtype):
    x = fill(kind, 196, 136, dtype)
    options = METHODS[method](x, axis)
    for group in (None, 32, 64) if "lower" not in options else (None,):
        check_against_reference(codebook_ops.simulate_quantized, x, bits=3, axis=axis, group=group, **options)
        if "compat" not in options:
            check_against_reference(
                codebook_ops.simulate_quantized, x, bits=3, axis=axis, group=group, compat=True, **options
            )


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9])
def test_long_vectors_equal_the_reference(fraction, axis, dtype):
    for kind, shape in (("normal", (9000, 72)), ("ties", (5000, 64)), ("sink", (4099, 136)), ("drift", (4100, 64))):
        x = fill(kind, *shape, dtype)
        check_against_reference(
            codebook_ops.simulate_quantized, x, bits=4, axis=axis, outlier_fraction=fraction, protected_tokens=1
        )


TAILS = {
    "as sampled": lambda x: x,
    "ordered tokens": lambda x: x.sort(0).values,
    "a burst": lambda x: torch.where(torch.arange(len(x))[:, None] % 97 < 90, x, x * 64),
    "two values": lambda x: x.sign(),
    "equal at one end": lambda x: x.clamp(max=0.5),
    "zeros": lambda x: torch.where(x.abs() < 1.5, torch.zeros_like(x), x),
    "constant channels": lambda x: torch.where(torch.arange(x.shape[1]) % 3 == 0, x[:1], x),
    "few outside": lambda x: torch.where(torch.arange(len(x))[:, None] < 12, x * 100, torch.ones_like(x)),
}


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("shape", [(1024, 64), (4097, 72), (20000, 40), (130, 1024), (40, 2048), (12, 4096)], ids=str)
def test_outliers_equal_the_reference_whatever_the_ends_look_like(shape, tail, axis, dtype):
    x = TAILS[tail](fill("normal", *shape, torch.float32)).to(dtype)
    for options in (
        dict(outlier_fraction=0.01, protected_tokens=1),
        dict(outlier_fraction=0.03, codebook=codebook(3), layout=PADDED if shape[1] == 72 else PLAIN),
        dict(outlier_fraction=0.01, group=1500, compat=True),
    ):
        check_against_reference(codebook_ops.simulate_quantized, x, bits=3, axis=axis, **options)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.01])
def test_large_tensors_give_what_their_columns_give(fraction, dtype):
    """Of more elements than the reference does in bearable time: channels know nothing of each other."""
    x = torch.randn(30000, 1064, generator=torch.Generator().manual_seed(SEED)).to(dtype).cuda()
    options = dict(bits=4, axis="per_channel", outlier_fraction=fraction)
    out = torch.empty_like(x)
    _, counts = codebook_ops.simulate_quantized(x, out=out, **options)
    outliers = 0
    for first in range(0, 1064, 152):
        part = torch.empty(30000, 152, dtype=dtype, device="cuda")
        outliers += codebook_ops.simulate_quantized(x[:, first : first + 152], out=part, **options)[1].outliers
        assert_same_bits(part.cpu(), out[:, first : first + 152].cpu(), f"channels from {first}")
    assert counts.outliers == outliers and counts.quantized == x.numel()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(300, 136), (5000, 72)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("method", METHODS)
def test_a_value_that_is_not_finite_is_named_and_x_stays(method, axis, dtype, shape, bad):
    x = fill("normal", *shape, dtype)
    options = METHODS[method](x, axis)
    x[170, 69], x[200, 3] = bad, float("nan")
    for group in (None, 64) if "lower" not in options else (None,):
        for in_place in (False, True):
            on_gpu = x.cuda()
            out = on_gpu if in_place else torch.empty_like(on_gpu)
            with pytest.raises(ValueError, match="sequence 0, token 170, channel 69"):
                codebook_ops.simulate_quantized(on_gpu, 3, axis=axis, group=group, out=out, **options)
            assert_same_bits(x, on_gpu)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("layout", [PLAIN, PADDED, STRIDED], ids=["plain", "padded", "strided"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("head_dim", [1, 3, 64, 80, 128, 256, 300, 1024])
def test_rotation_equals_the_reference_bit_for_bit(head_dim, direction, layout, dtype):
    x = fill("normal", 37, 2 * head_dim, dtype)
    rotation = torch.from_numpy(np.random.default_rng(SEED).normal(size=(head_dim, head_dim)).astype(np.float32))
    expected = codebook_ops.rotate(x, rotation, direction=direction)
    source, target = place(x, layout), Guarded(x.shape, x.dtype, layout)
    codebook_ops.rotate(source.view, rotation.cuda(), direction=direction, out=target.view)
    assert ops.last_implementation() == "cuda"
    assert_same_bits(expected, target.view, "out of place")
    codebook_ops.rotate(source.view, rotation.cuda(), direction=direction, out=source.view)
    assert_same_bits(expected, source.view, "in place")
    assert source.guards_are_intact() and target.guards_are_intact()
