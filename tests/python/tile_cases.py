"""Tiles for tests: compressed caches of any shape and filling, what they stand for in float64, and attention on that.

The oracle never looks at the uncompressed cache: a tile stands for what the reference unpacks, so errors of a format
and errors of a kernel are not mixed up.
"""

import os
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from cuda_tensors import SEED, Guarded

from kvpack import attend_tile64, compress_tile64, multiply_keys, multiply_values, ops, unpack_tile64

DEVICE = "cuda"
# docs/numerics.md section 8. Rounding a bfloat16 result once costs 1.7e-3 of it already.
LARGEST_ERROR = 2e-3
FEW_ELEMENTS = 4096
worst_errors: dict[tuple[str, torch.dtype], tuple[float, str]] = {}


@dataclass(frozen=True)
class Case:
    """One call of attention or of a product; batch, heads, group and rows differ, so that a swapped index shows."""

    key_bits: int = 2
    value_bits: int = 2
    dtype: torch.dtype = torch.float16
    head_dim: int = 128
    batch: int = 2
    kv_heads: int = 3
    group: int = 4
    rows: int = 1
    tokens: int = 200
    fill: str = "normal"
    sparsity: float = 0.7
    recent: int = 0
    layout: str = "plain"
    causal: bool = False
    scale: float | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        """The parameters that are not the usual ones, as pytest and messages show them."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(changed).replace("torch.", "") or "usual"


def generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU, seeded by the tests' seed and the numbers that tell two tensors apart."""
    return torch.Generator().manual_seed(hash((SEED, *numbers)) % 2**63)


def fill_cache(fill: str, batch: int, kv_heads: int, tokens: int, head_dim: int, salt: int) -> torch.Tensor:
    """K or V [batch, kv_heads, tokens, head_dim] in float32; every filling is there for a branch that it reaches."""
    shape = (batch, kv_heads, tokens, head_dim)
    sample = torch.randn(shape, generator=generator(batch, kv_heads, tokens, head_dim, salt))
    t, c = torch.arange(tokens)[:, None], torch.arange(head_dim)
    return {
        "normal": lambda: sample,
        "channels of different size": lambda: sample * torch.exp2(c % 7 - 3.0) / 4,
        "above zero": lambda: 5 + sample.abs(),  # zero lies outside the codes of every tile
        "far below zero": lambda: -100 - sample.abs(),  # and more than 2048 steps away with 8 bits
        "one survivor a tile": lambda: torch.where((t + 3 * c) % 64 == 0, 2.6 * sample, 0.0),
        "equal survivors": lambda: torch.where((t + c) % 3 == 0, 1.75, 0.0).expand(shape),
        "whole blocks of zeros": lambda: torch.where(t // 64 % 2 == 0, 0.0, sample),
        "tiles of zeros": lambda: torch.where((c % 5 == 0) | (t % 5 == 0), 0.0, sample),
        "zeros": lambda: torch.zeros(shape),
        "large": lambda: sample.clamp(-4, 4) * 8000,  # a scale times q overflows float16
        "tiny": lambda: sample * 0.01,
        "one loud token": lambda: torch.where(t == tokens // 2, 8 * sample, sample),
    }[fill]()


@lru_cache(maxsize=64)
def tiles_of(kind: str, bits: int, dtype: torch.dtype, shape: tuple[int, ...], fill: str, sparsity: float):
    """Tiles on the device, and the float64 cache [batch, kv_heads, tokens, head_dim] that they stand for in x's type.

    Packed and unpacked on the CPU: what CUDA packs is tested elsewhere and must not hide what attention does.
    """
    x = fill_cache(fill, *shape, salt=0 if kind == "key" else 1).to(dtype)
    tiles = compress_tile64(x, kind, sparsity=sparsity, bits=bits)
    out = torch.empty(shape, dtype=dtype)
    unpack_tile64(tiles, out=out)
    assert x.numel() == 0 or ops.last_implementation() == "reference"
    return tiles.to(DEVICE), out.double().to(DEVICE)


def keys_of(case: Case):
    """Key tiles of a case and what they stand for."""
    shape = (case.batch, case.kv_heads, case.tokens, case.head_dim)
    return tiles_of("key", case.key_bits, case.dtype, shape, case.fill, case.sparsity)


def values_of(case: Case):
    """Value tiles of a case and what they stand for."""
    shape = (case.batch, case.kv_heads, case.tokens, case.head_dim)
    return tiles_of("value", case.value_bits, case.dtype, shape, case.fill, case.sparsity)


def query_of(case: Case) -> torch.Tensor:
    """Q [batch, q_heads, rows, head_dim]."""
    shape = (case.batch, case.kv_heads * case.group, case.rows, case.head_dim)
    return torch.randn(shape, generator=generator(2, *shape)).to(case.dtype).to(DEVICE)


def probabilities_of(case: Case) -> torch.Tensor:
    """P [batch*q_heads, rows, tokens], rows that sum to about 1."""
    shape = (case.batch * case.kv_heads * case.group, case.rows, case.tokens)
    return torch.randn(shape, generator=generator(3, *shape)).softmax(-1).to(case.dtype).to(DEVICE)


def recent_of(case: Case) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values of the recent window [batch, kv_heads, recent, head_dim] in the memory layout of the case."""
    if not case.recent:
        return None
    b, h, n, d = case.batch, case.kv_heads, case.recent, case.head_dim
    pair = []
    for salt in (4, 5):
        x = torch.randn((b, h, n, d), generator=generator(salt, b, h, n, d)).to(case.dtype)
        memory = {
            "plain": lambda: _nan(b, h, n, d, dtype=case.dtype),
            "tokens outside heads": lambda: _nan(b, n, h, d, dtype=case.dtype).permute(0, 2, 1, 3),
            "a window of a ring": lambda: _nan(b, h, n + 40, d, dtype=case.dtype)[:, :, 7 : 7 + n],
            "unaligned rows": lambda: _nan(b, h, n, d + 3, dtype=case.dtype)[..., 1 : d + 1],
        }[case.layout]()
        pair.append(memory.copy_(x))
    return pair[0], pair[1]


def _nan(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


# --- the oracle ------------------------------------------------------------------------------------------------------


def multiply_keys_in_float64(keys: torch.Tensor, q: torch.Tensor, case: Case) -> torch.Tensor:
    """Scores [batch*q_heads, rows, tokens]."""
    heads = keys.flatten(0, 1).repeat_interleave(case.group, 0)
    return q.double().view(-1, case.rows, case.head_dim) @ heads.transpose(1, 2)


def multiply_values_in_float64(values: torch.Tensor, p: torch.Tensor, case: Case) -> torch.Tensor:
    """Outputs [batch*q_heads, rows, head_dim]."""
    return p.double() @ values.flatten(0, 1).repeat_interleave(case.group, 0)


def attend_in_float64(keys, values, q, recent, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, q_heads, rows, head_dim] and log-sum-exp [batch, q_heads, rows]."""
    if recent is not None:
        keys = torch.cat([keys, recent[0].double()], 2)
        values = torch.cat([values, recent[1].double()], 2)
    scores = multiply_keys_in_float64(keys, q, case) * (case.scale or case.head_dim**-0.5)
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if case.causal:
        own = case.tokens + case.recent - case.rows + torch.arange(case.rows, device=scores.device)
        hidden = torch.arange(scores.shape[-1], device=scores.device) > own[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = multiply_values_in_float64(values, weights, case)
    return out.view(q.shape), lse.view(q.shape[:3])


# --- running and comparing -------------------------------------------------------------------------------------------


class GuardedOutput:
    """A tensor of any shape full of NaN bits, between guards."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.guarded = Guarded((1, max(1, torch.Size(shape).numel())), dtype)
        self.view = self.guarded.view.flatten()[: torch.Size(shape).numel()].view(shape)

    def check(self) -> torch.Tensor:
        """The tensor, after a look at its guards."""
        assert self.guarded.guards_are_intact(), "something was written beside the output"
        return self.view


def poison_device_memory() -> None:
    """Leaves NaN bits in the memory that the next allocations get: a workspace is not zero when a call receives it.

    Under compute-sanitizer nothing is handed on, and initcheck sees for itself what was never written.
    """
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        return
    blocks = [torch.full((2**power,), -1, dtype=torch.int8, device=DEVICE) for power in range(9, 26) for _ in range(2)]
    del blocks


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Compares with float64 by norm; a failure shows the worst element."""
    difference = actual.double() - expected
    norm, error = expected.norm().item(), difference.norm().item()
    allowed = LARGEST_ERROR * norm
    if actual.numel() < FEW_ELEMENTS:  # rounding few elements to their type may cost more than on average
        allowed += (expected.to(actual.dtype).double() - expected).norm().item()
    relative = error / norm if norm else error
    operation = what.partition(":")[0]
    if actual.numel() >= FEW_ELEMENTS and not relative <= worst_errors.get((operation, actual.dtype), (0.0,))[0]:
        worst_errors[operation, actual.dtype] = (relative, what)
    if error <= allowed:
        return
    at = difference.abs().nan_to_num(torch.inf).flatten().argmax().item()
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), actual.shape))
    raise AssertionError(
        f"{what}: relative error {relative:.2e}, allowed {allowed / norm if norm else 0:.2e}; the worst at {place} of "
        f"{tuple(actual.shape)}: expected {expected[place].item()!r}, got {actual[place].item()!r}; seed {SEED}"
    )


def check_keys(case: Case) -> None:
    """Runs multiply_keys on a case beside the oracle."""
    tiles, dense = keys_of(case)
    q = query_of(case)
    out = GuardedOutput((case.batch * case.kv_heads * case.group, case.rows, case.tokens), case.dtype)
    poison_device_memory()
    multiply_keys(tiles, q.flatten(0, 1), out=out.view)
    assert out.view.numel() == 0 or ops.last_implementation() == DEVICE
    assert_close(out.check(), multiply_keys_in_float64(dense, q, case), f"multiply_keys: {case}")


def check_values(case: Case) -> None:
    """Runs multiply_values on a case beside the oracle."""
    tiles, dense = values_of(case)
    p = probabilities_of(case)
    out = GuardedOutput((case.batch * case.kv_heads * case.group, case.rows, case.head_dim), case.dtype)
    poison_device_memory()
    multiply_values(tiles, p, out=out.view)
    assert out.view.numel() == 0 or ops.last_implementation() == DEVICE
    assert_close(out.check(), multiply_values_in_float64(dense, p, case), f"multiply_values: {case}")


def attend(case: Case, q: torch.Tensor, out: torch.Tensor | None = None, *, recent=None, return_lse: bool = False):
    """Runs attend_tile64 with the options of a case."""
    options = {name: getattr(case, name) for name in ("scale", "softcap", "causal")}
    keys, values = keys_of(case)[0], values_of(case)[0]
    return attend_tile64(q, keys, values, recent=recent, out=out, return_lse=return_lse, **options)


def check_attention(case: Case) -> None:
    """Runs attend_tile64 on a case beside the oracle, log-sum-exp included."""
    q, recent = query_of(case), recent_of(case)
    out = GuardedOutput(tuple(q.shape), case.dtype)
    poison_device_memory()
    _, lse = attend(case, q, out.view, recent=recent, return_lse=True)
    assert ops.last_implementation() == DEVICE
    expected, expected_lse = attend_in_float64(keys_of(case)[1], values_of(case)[1], q, recent, case)
    assert_close(out.check(), expected, f"attend_tile64: {case}")
    torch.testing.assert_close(
        lse, expected_lse.float(), rtol=LARGEST_ERROR, atol=LARGEST_ERROR, msg=lambda text: f"lse: {case}: {text}"
    )
