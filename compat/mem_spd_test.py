#!/usr/bin/env python3
"""Memory and speed of decode steps over a growing cache: dense against tiles, as Mustafar's mem_spd_test measured them.

One layer: a prompt is taken, then tokens are generated one by one; --layers multiplies the bytes. CPU or GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from kvpack import attend_tile64, compress_tile64, concat_tile64

BLOCK = 64


def parse() -> argparse.Namespace:
    """The command line; the default head shape is that of Llama-3-8B."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--batch", type=int, default=8 if on_gpu else 1)
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128, 256))
    parser.add_argument("--prompt", type=int, default=32768 if on_gpu else 4096, help="tokens before the first step")
    parser.add_argument(
        "--steps", type=int, default=130, help="tokens to generate; two blocks are compressed meanwhile"
    )
    parser.add_argument("--layers", type=int, default=32, help="for the bytes; one layer is measured")
    parser.add_argument("--k-sparsity", type=float, default=0.7)
    parser.add_argument("--v-sparsity", type=float, default=0.7)
    parser.add_argument("--k-bits", type=int, default=2, choices=(1, 2, 4, 8, 16))
    parser.add_argument("--v-bits", type=int, default=2, choices=(1, 2, 4, 8, 16))
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--dtype", default="float16" if on_gpu else "bfloat16", choices=("float16", "bfloat16"))
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    return parser.parse_args()


class DenseCache:
    """Keys and values as they are, in memory that is there from the start."""

    def __init__(self, options: argparse.Namespace, keys: torch.Tensor, values: torch.Tensor) -> None:
        room = (options.batch, options.kv_heads, options.prompt + options.steps, options.head_dim)
        self.keys, self.values = keys.new_empty(room), values.new_empty(room)
        self.tokens = options.prompt
        self.keys[:, :, : self.tokens], self.values[:, :, : self.tokens] = keys, values

    def step(self, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Appends one token and attends to all."""
        self.keys[:, :, self.tokens : self.tokens + 1], self.values[:, :, self.tokens : self.tokens + 1] = key, value
        self.tokens += 1
        seen = self.keys[:, :, : self.tokens], self.values[:, :, : self.tokens]
        return torch.nn.functional.scaled_dot_product_attention(q, *seen, enable_gqa=True)

    @property
    def num_bytes(self) -> int:
        """Of the tokens seen."""
        batch, kv_heads, _, head_dim = self.keys.shape
        return 2 * batch * kv_heads * self.tokens * head_dim * self.keys.itemsize


class TiledCache:
    """Tiles, and a dense window of `window` to window + 63 tokens."""

    def __init__(self, options: argparse.Namespace, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.options = options
        self.tiles: tuple = ()
        self.recent = keys, values
        self.compress_old()

    def compress_old(self) -> None:
        """Packs the blocks of 64 that are older than the window."""
        count = (self.recent[0].shape[2] - self.options.window) // BLOCK * BLOCK
        if count <= 0:
            return
        how = (
            ("key", self.options.k_sparsity, self.options.k_bits),
            ("value", self.options.v_sparsity, self.options.v_bits),
        )
        new = tuple(
            compress_tile64(x[:, :, :count], kind, sparsity=sparsity, bits=bits, exact_size=True)
            for x, (kind, sparsity, bits) in zip(self.recent, how, strict=True)
        )
        old = self.tiles
        self.tiles = tuple(concat_tile64(pair) for pair in zip(old, new, strict=True)) if old else new
        self.recent = tuple(x[:, :, count:].clone() for x in self.recent)

    def step(self, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Appends one token and attends to tiles and window."""
        self.recent = tuple(torch.cat([x, new], 2) for x, new in zip(self.recent, (key, value), strict=True))
        out = attend_tile64(q, *self.tiles, recent=self.recent)
        self.compress_old()
        return out

    @property
    def num_bytes(self) -> int:
        """Tiles with all that belongs to them, and the window."""
        return sum(t.num_bytes for t in self.tiles) + sum(x.numel() * x.itemsize for x in self.recent)


def wait(device: str) -> None:
    """Waits for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def run(name: str, make: Callable[[], DenseCache | TiledCache], options: argparse.Namespace) -> tuple[int, float]:
    """Fills a cache, generates, prints; bytes and median seconds of a step."""
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    wait(options.device)
    start = time.perf_counter()
    cache = make()
    wait(options.device)
    filled = time.perf_counter() - start
    dtype = getattr(torch, options.dtype)
    shape = (options.batch, options.heads, 1, options.head_dim)
    kv_shape = (options.batch, options.kv_heads, 1, options.head_dim)
    times = []
    for _ in range(options.steps):
        q, key, value = (torch.randn(s, device=options.device, dtype=dtype) for s in (shape, kv_shape, kv_shape))
        wait(options.device)
        start = time.perf_counter()
        out = cache.step(q, key, value)
        wait(options.device)
        times.append(time.perf_counter() - start)
    assert torch.isfinite(out).all(), "the output is not finite"
    median, mean = statistics.median(times), statistics.mean(times)
    print(
        f"{name:<8} fill {filled * 1e3:9.2f} ms   step {median * 1e6:9.1f} us (mean {mean * 1e6:.1f}, "
        f"longest {max(times) * 1e6:.1f})   cache {cache.num_bytes * options.layers / 2**20:9.1f} MiB"
    )
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() - held
        print(f"{'':<8} peak of allocated memory, one layer: {peak / 2**20:.1f} MiB")
    return cache.num_bytes, median


def main() -> int:
    """Measures both caches on the same tensors."""
    options = parse()
    if options.prompt < BLOCK + options.window:
        print(f"--prompt is {options.prompt}; it must be at least {BLOCK + options.window}", file=sys.stderr)
        return 2
    if options.steps < 1 or options.window < 0 or options.heads % options.kv_heads:
        print(
            f"--steps {options.steps} (at least 1), --window {options.window} (at least 0) and --heads {options.heads} "
            f"(a multiple of --kv-heads {options.kv_heads}) do not fit",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    for name, value in vars(options).items():
        print(f"{name:<12} {value}")
    shape = (options.batch, options.kv_heads, options.prompt, options.head_dim)
    keys, values = (torch.randn(shape, device=options.device, dtype=getattr(torch, options.dtype)) for _ in range(2))
    with torch.no_grad():
        dense = run("dense", lambda: DenseCache(options, keys, values), options)
        tiles = run("tiles", lambda: TiledCache(options, keys, values), options)
    print(f"memory: tiles take {tiles[0] / dense[0]:.1%} of dense; speed: {dense[1] / tiles[1]:.2f}x of dense")
    return 0


if __name__ == "__main__":
    sys.exit(main())
