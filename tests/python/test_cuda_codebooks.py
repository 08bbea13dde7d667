"""Codebooks, rms scales, calibrated thresholds and rotations on CUDA: the bits of the reference in any layout."""

import numpy as np
import pytest
import torch
from cuda_tensors import AGAINST_REFERENCE, PADDED, PLAIN, STRIDED, assert_same_bits, check_against_reference, fill
from test_cuda import AXES, DTYPES, UNIFORM_CASES

from kvpack import codebook_ops

pytestmark = AGAINST_REFERENCE


def codebook_of(bits: int) -> np.ndarray:
    """Centroids that are not evenly spaced."""
    place = np.linspace(-1, 1, 2**bits)
    return (0.3 * place + 0.7 * place**3).astype(np.float32)


def thresholds_of(x: torch.Tensor, axis: str) -> dict:
    """Ranges that some elements leave, one of them empty."""
    count = x.shape[-1] if axis == "per_channel" else x.shape[-2]
    place = np.arange(count)
    lower = np.where(place % 11 == 10, 0.5, -0.75 - 0.125 * (place % 7)).astype(np.float32)
    upper = np.where(place % 11 == 10, 0.5, 0.5 + 0.25 * (place % 5)).astype(np.float32)
    return {"mode": "calibrated", "lower": lower, "upper": upper}


def options_of(method: str, x: torch.Tensor, axis: str, bits: int, options: dict) -> dict:
    """The options of a uniform case with a method put on top."""
    options = dict(options, bits=bits, axis=axis)
    if method != "calibrated uniform":
        options["codebook"] = codebook_of(bits)
    if method == "q-norm":
        options["norm"] = (1.25, -0.0625)
    if method == "rms":
        options |= {"scale": "rms", "outlier_fraction": 0.0}
    if method.startswith("calibrated"):
        options |= thresholds_of(x, axis)
    return options


METHODS = ["nuq", "q-norm", "rms", "calibrated uniform", "calibrated nuq"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", UNIFORM_CASES)
def test_every_method_equals_the_reference_bit_for_bit(name, axis, method):
    case = {"bits": 4, "kind": "normal", "layout": PLAIN} | UNIFORM_CASES[name]
    kind, shape, layout, bits = (case.pop(key) for key in ("kind", "shape", "layout", "bits"))
    for dtype in DTYPES:
        x = fill(kind, *shape, dtype)
        check_against_reference(
            codebook_ops.simulate_quantized, x, layout, **options_of(method, x, axis, bits, dict(case))
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", ["constant", "ties", "mostly ties", "positive", "drift", "denormal", "zeros", "huge"])
def test_every_method_equals_the_reference_on_every_kind_of_data(kind, axis, method):
    x = fill(kind, 83, 72, torch.float32)
    for bits in (2, 3, 4, 5, 8):
        for compat in (False, True):
            options = {"compat": compat, "outlier_fraction": 0.02 if bits % 2 else 0.0}
            check_against_reference(codebook_ops.simulate_quantized, x, **options_of(method, x, axis, bits, options))


def test_without_a_codebook_it_is_simulate_uniform():
    for name in ("a thousand channels", "1 % outliers", "causal, group 32, protected", "clamped offset"):
        case = {"bits": 4, "kind": "normal", "layout": PLAIN} | UNIFORM_CASES[name]
        x = fill(case.pop("kind"), *case.pop("shape"), torch.float16)
        for axis in AXES:
            check_against_reference(codebook_ops.simulate_quantized, x, axis=axis, **case)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_value_that_is_not_finite_is_named_and_x_stays_as_it_was(method, in_place):
    x = fill("normal", 2 * 65, 70, torch.float32).view(2, 65, 70)
    x[1, 17, 69], x[1, 20, 3] = float("inf"), float("nan")
    for axis in AXES:
        on_gpu = x.cuda()
        out = on_gpu if in_place else torch.empty_like(on_gpu)
        options = options_of(method, x, axis, 4, {})
        with pytest.raises(ValueError, match="sequence 1, token 17, channel 69"):
            codebook_ops.simulate_quantized(on_gpu, out=out, **options)
        assert_same_bits(x, on_gpu)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("layout", [PLAIN, PADDED, STRIDED], ids=["plain", "padded", "strided"])
@pytest.mark.parametrize("head_dim", [1, 7, 16, 33, 64, 80, 128, 256, 300, 1024])
def test_rotating_equals_the_reference_bit_for_bit(head_dim, layout, direction):
    rotation = torch.from_numpy(codebook_ops.random_rotation(head_dim, 4))

    def rotate(x, out=None):
        rotated = codebook_ops.rotate(x, rotation.to(x.device), direction=direction, out=out)
        return rotated, None

    for dtype in DTYPES:
        for tokens in (1, 19):
            check_against_reference(rotate, fill("normal", tokens, 3 * head_dim, dtype), layout)


def test_a_rotation_on_another_device_is_refused():
    x = fill("normal", 4, 8, torch.float32)
    with pytest.raises(ValueError, match="rotation is on cpu"):
        codebook_ops.rotate(x.cuda(), torch.eye(8))
