"""Every policy on small CUDA tensors against the CPU: what compute-sanitizer runs of the quantisers and of klt."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from calibrations import make_calibration
from cuda_tensors import AGAINST_REFERENCE
from klt_calibrations import make_klt_calibration, make_states

from kvpack import BitsTally, list_presets, simulate_pair, simulate_tensor
from kvpack.klt import compress_klt, simulate_klt, unpack_klt
from kvpack.klt_methods import choices_of
from kvpack.klt_tables import find_codecs
from kvpack.methods import Kind
from kvpack.policy import Policy, parse_policy

pytestmark = AGAINST_REFERENCE
PLAIN = [name for name in list_presets() if not parse_policy(name).needs_calibration]
MODIFIED = [
    "int4+1%+sink4+window7", "int3+1%+causal", "int2+clamp+causal", "kivi-2+sink+causal", "nf3+1%+sink",
    "turbo-3+sink4", "mustafar-70+kth_value",
]  # fmt: skip
CALIBRATED = ["nuq3+1%+sink", "nuq2", "nuq3+1%+calibrated", "int4+1%+calibrated", "nuq3+qnorm"]
KLT = ["klt-2.4+sink", "klt-1", "klt-5-fast", "klt-2-joint+sink", "klt-3-fast-joint", "klt-2-heads1+sink4"]


@cache
def klt_calibration() -> Any:
    return make_klt_calibration(layers=1, head_dim=16)


def compare(policy: Policy, kind: Kind, x: torch.Tensor, **options: Any) -> None:
    """The GPU's result is the CPU's, but for products of rotations, which the devices sum in other orders."""
    tallies = BitsTally(), BitsTally()
    on_cpu = simulate_tensor(x, policy, kind, tally=tallies[0], **options)
    on_gpu = simulate_tensor(x.cuda(), policy, kind, tally=tallies[1], **options).cpu()
    assert tallies[0] == tallies[1]
    if policy.name.startswith("turbo"):
        # A sum that is rounded otherwise can meet the other side of a boundary: one code, in few rows.
        off = (on_gpu != on_cpu).any(dim=-1).float().mean()
        assert off < 0.1 and torch.equal(on_gpu[:, : policy.sink], x[:, : policy.sink])
    else:
        assert torch.equal(on_gpu, on_cpu)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("name", [*PLAIN, *MODIFIED])
def test_small_tensors_of_every_policy(name: str, kind: Kind, dtype: torch.dtype) -> None:
    x = make_states(150, 128, 3).view(2, 75, 128).to(dtype)
    compare(parse_policy(name), kind, x, head_dim=64)


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("name", CALIBRATED)
def test_small_tensors_of_calibrated_policies(name: str, kind: Kind) -> None:
    x = make_states(150, 16, 4).view(2, 75, 16)
    compare(parse_policy(name), kind, x, head_dim=8, layer=1, calibration=make_calibration())


@pytest.mark.parametrize("tokens", [3, 75, 300])
@pytest.mark.parametrize("name", KLT)
def test_small_rows_of_klt(name: str, tokens: int) -> None:
    """Few tokens take pack_kernel, many pack_tiles_kernel; both hold the law."""
    policy, calibration = parse_policy(name), klt_calibration()
    key, value = (make_states(2 * tokens, 32, seed).view(2, tokens, 32).half() for seed in (5, 6))
    options: dict[str, Any] = {"head_dim": 16, "layer": 0, "calibration": calibration}
    tallies = BitsTally(), BitsTally()
    on_cpu = simulate_pair(key, value, policy, tally=tallies[0], **options)
    on_gpu = simulate_pair(key.cuda(), value.cuda(), policy, tally=tallies[1], **options)
    assert tallies[0] == tallies[1]
    for found, expected, dense in zip(on_gpu, on_cpu, (key, value), strict=True):
        # Where a coefficient lies at a boundary, tensor cores may choose the other code.
        off = ((found.cpu() - expected).float().abs().amax(dim=-1) > 0.05 * dense.float().std()).float().mean()
        assert off < 0.02
    for (_, kind), codec in find_codecs(calibration, choices_of(policy, calibration)).items():
        x = {"key": key, "value": value, "joint": torch.cat((key, value), -1)}[kind].cuda()
        tables = codec.tables_on(x)
        rows = compress_klt(x, tables, protected_tokens=min(policy.sink, tokens))
        expected = simulate_klt(x, tables, protected_tokens=min(policy.sink, tokens))
        assert torch.equal(unpack_klt(rows, tables), expected)
