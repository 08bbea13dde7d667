"""Attention on tiles beside dense attention, in one run on one GPU: time, bytes, and what the setting costs in quality.

Every result is checked against float64 over the unpacked cache before it is timed, on one KV head of one sequence.
How to read the table: docs/gpu.md.

    python benches/bench_tile64_cuda.py [--quick | --full] [--only TEXT] [--no-write]
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import NamedTuple

import torch
from common import write_results
from gpu_table import Table
from gpu_timing import rotations
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvpack import Tile64, attend_tile64, compress_tile64, multiply_keys, multiply_values, unpack_tile64

LARGEST_ERROR = 2e-3


class Shape(NamedTuple):
    """Decode attention: one query token a sequence."""

    batch: int
    q_heads: int
    kv_heads: int
    tokens: int
    head_dim: int = 128

    def __str__(self) -> str:
        """Batch x query heads/KV heads x tokens x head_dim."""
        return f"{self.batch}x{self.q_heads}/{self.kv_heads}x{self.tokens}x{self.head_dim}"

    @property
    def elements(self) -> int:
        """Of K, or of V."""
        return self.batch * self.kv_heads * self.tokens * self.head_dim


class Setting(NamedTuple):
    """One way of compressing."""

    bits: int
    sparsity: float

    def __str__(self) -> str:
        """Bits of a survivor and share dropped."""
        return f"{self.bits} bit {self.sparsity:.0%}".replace("%", " %")


SHAPES = (Shape(8, 32, 8, 8192), Shape(8, 32, 8, 32768), Shape(1, 32, 8, 131072), Shape(32, 32, 8, 4096))
QUICK_SHAPES = SHAPES[:1]
FULL_SHAPES = (
    *SHAPES,
    Shape(8, 32, 8, 32768, 64),
    Shape(8, 64, 8, 16384),
    Shape(8, 32, 32, 8192),
    Shape(1, 32, 8, 1024),
)
SETTINGS = (Setting(16, 0.7), Setting(8, 0.7), Setting(4, 0.7), Setting(2, 0.7), Setting(1, 0.7), Setting(2, 0.5))
COMPRESS_SETTINGS = (Setting(16, 0.7), Setting(2, 0.7))
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def policy_of(setting: Setting) -> str:
    """The name of a setting in `kvpack eval`."""
    return f"mustafar-{setting.sparsity * 100:.0f}" + ("" if setting.bits == 16 else f"-q{setting.bits}")


class Cache:
    """Random K and V, a query and probabilities for each of several rotations."""

    def __init__(self, shape: Shape, copies: int):
        self.shape = shape
        dense = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
        self.k, self.v = ([_random(dense) for _ in range(copies)] for _ in range(2))
        self.q = [_random((shape.batch, shape.q_heads, 1, shape.head_dim)) for _ in range(copies)]
        self.flat_q = [q.flatten(0, 1) for q in self.q]
        # Relative to the largest, as in attention that divides at the end: of a long softmax, halves hold little.
        weights = (_random((shape.batch * shape.q_heads, 1, shape.tokens)) for _ in range(copies))
        self.p = [(x - x.amax(-1, keepdim=True)).exp() for x in weights]


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float16, device="cuda")


def bytes_of(*tensors: torch.Tensor) -> int:
    """Of the tensors together."""
    return sum(x.numel() * x.element_size() for x in tensors)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """By norm, in float64; NaN never passes."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


class WrongResult(Exception):
    """A result too far from float64's; its rows are not timed."""


def require_right(name: str, actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error, where it is small enough."""
    error = relative_error(actual, expected)
    if not error <= LARGEST_ERROR:
        raise WrongResult(f"{name}: relative error {error:.2e} against float64; at most {LARGEST_ERROR:.0e} is right")
    return error


def attend_in_float64(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Of the last KV head of the last sequence: [group, head_dim]."""
    group = q.shape[1] // k.shape[1]
    scores = q[-1, -group:, 0].double() @ k[-1, -1].double().T * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v[-1, -1].double()


def dense_attention(kind: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of torch by one backend alone, which refuses what it cannot do."""
    with sdpa_kernel(kind):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def bench_dense(table: Table, cache: Cache) -> float | None:
    """The dense rows; returns the microseconds that all ratios refer to, those of the first backend that works."""
    shape, dense_us = cache.shape, None
    group = shape.q_heads // shape.kv_heads
    expected = attend_in_float64(cache.k[0], cache.v[0], cache.q[0])
    for backend, kind in BACKENDS.items():
        name = f"{shape} / dense fp16, {backend}"
        try:
            out = dense_attention(kind, cache.q[0], cache.k[0], cache.v[0])
        except RuntimeError as error:
            print(f"{name}: not available: {str(error).splitlines()[0][:90]}")
            continue
        inputs = list(zip(cache.q, cache.k, cache.v, strict=True))
        moved = bytes_of(*inputs[0], out)
        taken = table.add(
            name,
            [partial(dense_attention, kind, *one) for one in inputs[: rotations(moved)]],
            moved=moved,
            elements=2 * shape.elements,
            dense_us=dense_us,
            is_dense=dense_us is None,
            bits_per_element=16.0,
            relative_error=require_right(name, out[-1, -group:, 0], expected),
        )
        dense_us = dense_us or taken.median_us
    return dense_us


class Run:
    """Tiles of one setting for each rotation, with what the calls write to."""

    def __init__(self, cache: Cache, setting: Setting):
        self.cache, self.setting, self.name = cache, setting, f"{cache.shape} / {setting}"
        self.keys, self.values = [], []
        while len(self.keys) < self.copies():
            i = len(self.keys)
            self.keys.append(compress(cache.k[i], "key", setting))
            self.values.append(compress(cache.v[i], "value", setting))
        self.counts = range(len(self.keys))
        self.unpacked = [torch.empty_like(x) for x in (cache.k[0], cache.v[0])]
        self.outs = [torch.empty_like(cache.q[i]) for i in self.counts]
        self.weighed = [torch.empty_like(cache.flat_q[i]) for i in self.counts]
        self.scores = [torch.empty_like(cache.p[i]) for i in self.counts]

    def copies(self) -> int:
        """Rotations that this setting needs, as far as there are inputs."""
        if not self.keys:
            return 1
        return min(rotations(self.keys[0].num_bytes + self.values[0].num_bytes), len(self.cache.q))

    def key_product(self, i: int) -> None:
        multiply_keys(self.keys[i], self.cache.flat_q[i], out=self.scores[i])

    def value_product(self, i: int) -> None:
        multiply_values(self.values[i], self.cache.p[i], out=self.weighed[i])

    def both_products(self, i: int) -> None:
        self.key_product(i)
        self.value_product(i)

    def attention(self, i: int) -> None:
        attend_tile64(self.cache.q[i], self.keys[i], self.values[i], out=self.outs[i])

    def unpack_then_dense(self, i: int) -> None:
        unpack_tile64(self.keys[i], out=self.unpacked[0])
        unpack_tile64(self.values[i], out=self.unpacked[1])
        with sdpa_kernel(list(BACKENDS.values()), set_priority=True):
            scaled_dot_product_attention(self.cache.q[i], *self.unpacked, enable_gqa=True)

    def check(self) -> dict[str, float]:
        """Relative errors of the last KV head of the last sequence against float64."""
        group = self.cache.shape.q_heads // self.cache.shape.kv_heads
        k, v = (unpack_tile64(tiles, dtype="float32") for tiles in (self.keys[0], self.values[0]))
        q, p = self.cache.q[0], self.cache.p[0]
        for out in (self.outs[0], self.scores[0], self.weighed[0]):
            out.fill_(torch.nan)
        self.both_products(0)
        self.attention(0)
        wanted = {
            "attention": (self.outs[0][-1, -group:, 0], attend_in_float64(k, v, q)),
            "key product": (self.scores[0][-group:, 0], q[-1, -group:, 0].double() @ k[-1, -1].double().T),
            "value product": (self.weighed[0][-group:, 0], p[-group:, 0].double() @ v[-1, -1].double()),
        }
        return {part: require_right(f"{self.name} {part}", *pair) for part, pair in wanted.items()}


def compress(x: torch.Tensor, kind: str, setting: Setting) -> Tile64:
    """Tiles whose payload has its real size."""
    return compress_tile64(x, kind, sparsity=setting.sparsity, bits=setting.bits).trim()


def bench_setting(table: Table, cache: Cache, setting: Setting, dense_us: float | None) -> None:
    """Products, fused attention and, as the unfused way, unpacking before dense attention."""
    parts = ("key product", "value product", "key + value", "attention", "unpack, then dense")
    name = f"{cache.shape} / {setting}"
    if not any(table.wants(f"{name} {part}") for part in parts):
        return
    run = Run(cache, setting)
    errors = run.check()
    elements, k, v = cache.shape.elements, run.keys[0].num_bytes, run.values[0].num_bytes
    q, p = bytes_of(cache.q[0]), bytes_of(cache.p[0])  # also the bytes of an output and of scores
    half = None if dense_us is None else dense_us / 2  # a product reads half of the cache
    dense_bytes = 4 * elements  # written once by unpacking, read once by attention
    rows = (
        (run.key_product, k, q + p, elements, half),
        (run.value_product, v, p + q, elements, half),
        (run.both_products, k + v, 2 * (q + p), 2 * elements, dense_us),
        (run.attention, k + v, 2 * q, 2 * elements, dense_us),
        (run.unpack_then_dense, k + v, 2 * q + 2 * dense_bytes, 2 * elements, dense_us),
    )
    for part, (call, stored, rest, covered, against) in zip(parts, rows, strict=True):
        if table.wants(f"{name} {part}"):
            table.add(
                f"{name} {part}",
                [partial(call, i) for i in run.counts],
                moved=stored + rest,
                elements=covered,
                dense_us=against,
                bits_per_element=8 * stored / covered,
                relative_error=errors.get(part),
                bits=setting.bits,
                sparsity=setting.sparsity,
                policy=policy_of(setting),
                quality=table.quality.get(policy_of(setting)),
            )


def bench_codec(table: Table, cache: Cache, setting: Setting) -> None:
    """Compressing and unpacking K and V, in copies of the same dense cache: dense attention says nothing about them."""
    shape, dense_bytes = cache.shape, 2 * cache.shape.elements
    copy_us = 2 * dense_bytes / table.copy * 1e6
    for kind, caches in (("key", cache.k), ("value", cache.v)):
        if not any(table.wants(f"{shape} / {setting} {part} {kind}s") for part in ("compress", "unpack")):
            continue
        tiles = compress(caches[0], kind, setting)
        check_codec(f"{shape} / {setting} compress {kind}s", caches[0], tiles, kind, setting)
        out = torch.empty_like(caches[0])
        options = dict(sparsity=setting.sparsity, bits=setting.bits)
        calls = {
            "compress": [partial(compress_tile64, x, kind, **options) for x in caches[: rotations(dense_bytes)]],
            "unpack": [partial(unpack_tile64, tiles, out=out)] * rotations(dense_bytes),
        }
        for part, part_calls in calls.items():
            name = f"{shape} / {setting} {part} {kind}s"
            if not table.wants(name):
                continue
            taken = table.add(
                name,
                part_calls,
                moved=dense_bytes + tiles.num_bytes,
                elements=shape.elements,
                dense_us=None,
                bits_per_element=8 * tiles.num_bytes / shape.elements,
                bits=setting.bits,
                sparsity=setting.sparsity,
            )
            dense_side = {
                "dense_gb_per_s": dense_bytes / taken.median_us / 1e3,
                "times_copy": taken.median_us / copy_us,
            }
            table.rows[-1] |= dense_side
            print(f"{'':50} dense side {dense_side['dense_gb_per_s']:.0f} GB/s, {dense_side['times_copy']:.2f} copies")


def check_codec(name: str, x: torch.Tensor, tiles: Tile64, kind: str, setting: Setting) -> None:
    """A slice of the tiles beside those that the reference makes of it on the CPU: the same bits."""
    slice_tokens = 256
    head = x[-1:, -1:, :slice_tokens].contiguous()
    options = dict(sparsity=setting.sparsity, bits=setting.bits)
    expected = unpack_tile64(compress_tile64(head.cpu(), kind, **options))
    actual = unpack_tile64(tiles)[-1:, -1:, :slice_tokens].cpu()
    if not torch.equal(expected, actual):
        raise WrongResult(f"{name}: {(expected != actual).sum()} of {expected.numel()} elements differ from the CPU's")


def run_shape(table: Table, shape: Shape) -> list[str]:
    """All rows of one shape; returns what failed, which stops no other row."""
    torch.cuda.empty_cache()
    # Enough rotations for the most compressed setting: about 0.35 bytes of tiles for an element of K or V.
    cache = Cache(shape, rotations(shape.elements * 7 // 10))
    dense_us = bench_dense(table, cache)
    if dense_us is None:
        print(f"{shape}: no dense row, so no ratios")
    benches = [partial(bench_setting, table, cache, setting, dense_us) for setting in SETTINGS]
    if shape in SHAPES[:2]:
        benches += [partial(bench_codec, table, cache, setting) for setting in COMPRESS_SETTINGS]
    failures = []
    for bench in benches:
        try:
            bench()
        except (WrongResult, RuntimeError, ValueError) as error:
            failures.append(f"{type(error).__name__}: {error}")
            print(failures[-1], flush=True)
    return failures


def main() -> None:
    """Runs the shapes and writes benches/results/tile64_cuda.json, unless only a part was run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this; dense rows always run")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="one shape, few rounds")
    sizes.add_argument("--full", action="store_true", help="more shapes: head_dim 64, groups of 1 and 8, a short cache")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device")
    torch.manual_seed(0)
    start = time.perf_counter()
    table = Table(arguments.only, rounds=5 if arguments.quick else 25)
    shapes = QUICK_SHAPES if arguments.quick else FULL_SHAPES if arguments.full else SHAPES
    failures = [failure for shape in shapes for failure in run_shape(table, shape)]
    print("no row for dense FP8: torch has no FP8 attention; docs/gpu.md has figures of FlashInfer's")
    print(f"{len(table.rows)} rows in {time.perf_counter() - start:.0f} s")
    if not (arguments.no_write or arguments.quick or arguments.only):
        print("written to", write_results("tile64_cuda", " ".join(["python", *sys.argv]), table.rows))
    if failures:
        raise SystemExit("\n".join([f"{len(failures)} settings failed and have no rows:", *failures]))


if __name__ == "__main__":
    main()
