"""The native operations from Python: torch and numpy, against straightforward torch code, and their refusals."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from kvpack import _native, ops

IMPLEMENTATIONS = sorted(
    row["name"]
    for row in ops.list_implementations()
    if row["operation"] == "simulate_uniform" and row["device"] == "cpu"
)


def torch_uniform(x, bits, dim, outlier_fraction):
    """KVQuant's dynamic dense-and-sparse method in torch; `levels / range` there is (1/range) * levels: compat."""
    levels = 2**bits - 1
    keep = torch.zeros_like(x, dtype=torch.bool)
    if outlier_fraction:
        t = 1 - outlier_fraction / 2
        keep = (x >= torch.quantile(x, t, dim, keepdim=True)) | (x <= torch.quantile(x, 1 - t, dim, keepdim=True))
    dense = torch.where(keep, x.median(dim, keepdim=True).values, x)
    low, high = dense.amin(dim, keepdim=True), dense.amax(dim, keepdim=True)
    qs = levels / (high - low)
    offset = low * qs
    result = (torch.clamp(torch.round(qs * dense - offset), 0, levels) + offset) / qs
    return torch.where(keep, x, torch.nan_to_num(result, 0.0, 0.0, 0.0)), int(keep.sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("axis", "dim"), [("per_channel", 0), ("per_token", 1)])
@pytest.mark.parametrize("outlier_fraction", [0.0, 0.01, 0.1])
def test_compat_reproduces_the_torch_tool_to_the_bit(implementation, bits, axis, dim, outlier_fraction):
    x = torch.randn(300, 144, generator=torch.Generator().manual_seed(5))
    expected, num_outliers = torch_uniform(x, bits, dim, outlier_fraction)
    actual, counts = ops.simulate_uniform(x, bits, axis=axis, outlier_fraction=outlier_fraction, compat=True)
    assert ops.last_implementation() == implementation
    assert counts.outliers == num_outliers
    assert torch.equal(expected, actual)


def test_numpy_and_torch_agree_in_every_layout(implementation):
    data = np.random.default_rng(1).standard_normal((2, 90, 64)).astype(np.float32)
    expected, _ = ops.simulate_uniform(torch.from_numpy(data), 3, axis="per_channel", outlier_fraction=0.05)
    for x in (data, np.asfortranarray(data), np.repeat(data, 2, axis=2)[:, :, ::2]):
        actual, _ = ops.simulate_uniform(x, 3, axis="per_channel", outlier_fraction=0.05)
        np.testing.assert_array_equal(actual, expected.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pruning_keeps_the_largest(implementation, dtype):
    x = torch.randn(40, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    pruned, counts = ops.prune_magnitude(x, 0.7, head_dim=64)
    heads = x.view(40, 3, 64)
    order = heads.abs().float().argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(heads, dtype=torch.bool).scatter_(-1, order[..., :20], True)
    assert torch.equal(pruned.view(40, 3, 64), torch.where(mask, heads, torch.zeros((), dtype=dtype)))
    assert counts == (120, 120 * 20)


def test_channel_scores_change_the_order_only(implementation):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    pruned, _ = ops.prune_magnitude(x, 0.5, channel_scores=torch.tensor([10.0, 1.0, 1.0, 1.0]))
    assert pruned.tolist() == [[1.0, 0.0, 0.0, 4.0]]


def test_compare_logits_agrees_with_torch(implementation):
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(30, 4099, generator=generator) * 3
    logits = reference + 0.2 * torch.randn(30, 4099, generator=generator)
    targets = torch.randint(0, 4099, (30,), generator=generator)
    result = ops.compare_logits(reference, logits, targets)
    p, q = (x.double().log_softmax(-1) for x in (reference, logits))
    np.testing.assert_allclose(result.kl, (p.exp() * (p - q)).sum(-1).numpy(), atol=1e-5)
    np.testing.assert_allclose(result.nll, -q.gather(1, targets[:, None])[:, 0].numpy(), atol=1e-5)
    np.testing.assert_array_equal(result.top1, (reference.argmax(-1) == logits.argmax(-1)).double().numpy())


def test_out_is_written_and_returned():
    x = torch.randn(20, 32)
    out = torch.full_like(x, float("nan"))
    result, _ = ops.simulate_uniform(x, 4, axis="per_token", out=out)
    assert result is out and bool(torch.isfinite(out).all())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ops.simulate_uniform(x, 6, axis="per_token"), ValueError, "bits is 6; it is one of 2, 3, 4, 5, 8"),
        (lambda x: ops.simulate_uniform(x, 4, axis="sideways"), ValueError, "'sideways'"),
        (lambda x: ops.simulate_uniform(x, 4, axis="per_token", group=0), ValueError, "group is 0"),
        (lambda x: ops.simulate_uniform(x.long(), 4, axis="per_token"), ValueError, "int64"),
        (lambda x: ops.simulate_uniform(x.int(), 4, axis="per_token"), ValueError, "int32"),
        (lambda x: ops.simulate_uniform(x.short(), 4, axis="per_token"), TypeError, "int16"),
        (lambda x: ops.simulate_uniform([1.0], 4, axis="per_token"), TypeError, "list"),
        (
            lambda x: ops.simulate_uniform(x, 4, axis="per_token", out=x[:3]),
            ValueError,
            r"\[4, 8\] but out has \[3, 8\]",
        ),
        (lambda x: ops.prune_magnitude(x, 1.5), ValueError, "sparsity is 1.5"),
        (lambda x: ops.prune_magnitude(x, 0.5, head_dim=3), ValueError, "head_dim 3 does not divide the 8 channels"),
        (lambda x: ops.prune_magnitude(x, 0.5, channel_scores=x[0, :4]), ValueError, r"\(4,\)"),
        (lambda x: ops.explain("fly"), ValueError, "simulate_uniform"),
        (lambda x: ops.explain("simulate_uniform", "tpu"), ValueError, "'tpu'"),
        (lambda x: ops.simulate_uniform(x.numpy()[::-1], 4, axis="per_token"), ValueError, "negative stride"),
        (lambda x: ops.simulate_uniform(x.numpy().astype(">f4"), 4, axis="per_token"), TypeError, ">f4|float32"),
        (lambda x: ops.set_num_threads(-2), ValueError, "-2"),
    ],
)
def test_refusals_show_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4, 8))


def test_structures_have_the_sizes_of_c_abi_h():
    # tests/cpp/bindings/c_abi_test.cpp checks the same numbers from the other side.
    assert _native.TENSOR.size == 88
    assert ctypes.sizeof(_native.PruneOptions) == 40
    assert ctypes.sizeof(_native.UniformOptions) == 48
    assert _native.TILE64.size + 6 * _native.TENSOR.size == 552
    assert ctypes.sizeof(_native.Tile64Options) == 32
    assert ctypes.sizeof(_native.AttendOptions) == 24
