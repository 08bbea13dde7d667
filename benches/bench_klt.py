"""Transform-coded rows on the CPU against the same steps in torch, side by side in one run.

torch does what one would write there: the product, the scale, one search in the boundaries for all coefficients of the
same number of levels, and the bits of all codes joined to bytes. Each case is checked before it is timed: our bytes
against the reference, torch's against ours. Unpacking in torch starts at codes of one byte, without the bits.

    python benches/bench_klt.py [--quick] [--no-write]
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from common import summarize, time_interleaved, write_results

from kvpack import ops
from kvpack.klt import KltTable, KltTables, compress_klt, unpack_klt

SHAPES = ((2048, 192), (2048, 1024))
# About what 2.4 bits look like (quality.md): 30 % dropped, few levels for most.
SHARES = (
    (64, 0.01),
    (32, 0.03),
    (16, 0.07),
    (12, 0.08),
    (10, 0.05),
    (8, 0.09),
    (6, 0.1),
    (5, 0.07),
    (4, 0.1),
    (3, 0.1),
)


def make_tables(channels: int) -> KltTables:
    """A table of random numbers with an orthogonal basis."""
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(channels, channels)))[0]
    deviations = np.exp(-3.0 * np.arange(channels) / channels)
    levels = [n for n, share in SHARES for _ in range(round(share * channels))]
    levels += [1] * (channels - len(levels))
    centroids = [np.sort(random.normal(size=n)) for n in levels]
    in_scale = deviations**2 >= 0.02
    table = KltTable.make(np.zeros(channels), basis, basis.T, deviations, levels, centroids, in_scale)
    return KltTables((table.to("cpu"),))


def low_bits(levels: int) -> int:
    """Bits below the digit of a code: levels are odd times a power of two."""
    return (levels & -levels).bit_length() - 1


def bits_of(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """[count, tokens] numbers as their lowest bits, [count * width, tokens] bytes of 0 and 1."""
    shifts = torch.arange(width).reshape(1, -1, 1)
    return (numbers[:, None] >> shifts & 1).to(torch.uint8).flatten(0, 1)


class TorchKlt:
    """The same method in torch: numbers of levels in groups, so that each group is one search."""

    def __init__(self, tables: KltTables) -> None:
        table = tables.blocks[0]
        self.mean, self.analysis, self.synthesis = table.mean, table.analysis, table.synthesis
        self.in_scale = table.in_scale.float()
        self.row_bytes = table.row_bytes
        self.groups = []
        first = place = 0
        for count in sorted(set(table.levels[table.levels > 1].tolist()), reverse=True):
            number = int((table.levels == count).sum())
            centroids = table.centroids[place : place + number * count].reshape(number, count).contiguous()
            boundaries = (centroids[:, 1:] * 0.5 + centroids[:, :-1] * 0.5).contiguous()
            self.groups.append((slice(first, first + number), count, centroids, boundaries))
            first, place = first + number, place + number * count

    def compress(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes as bytes, and scales."""
        z = (x - self.mean) @ self.analysis
        bits = ((z.square() @ self.in_scale) / self.in_scale.sum()).sqrt().half().view(torch.int16)
        # r keeps 3 bits of mantissa, ties to even.
        scale = (bits + 63 + (bits >> 7 & 1) >> 7 << 7).view(torch.float16)
        y = (z / scale.float()[:, None]).T.contiguous()
        codes = torch.empty(y.shape, dtype=torch.uint8)
        for members, _, _, boundaries in self.groups:
            codes[members] = torch.searchsorted(boundaries, y[members], out_int32=True).to(torch.uint8)
        return codes, scale

    def pack(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Rows of docs/formats/klt_rows.md: bits of all sections one after another, eight to a byte."""
        bits = [bits_of(scale.view(torch.int16)[None].int() >> 7, 8)]
        for width in (4, 2, 1, 6, 5, 3):
            bits += [bits_of(codes[g[0]], width) for g in self.groups if low_bits(g[1]) == width]
        for base, size, group_bits in ((3, 5, (2, 4, 5, 7, 8)), (5, 3, (3, 5, 7)), (7, 6, (3, 6, 9, 12, 15, 17))):
            parts = [codes[g[0]] >> low_bits(g[1]) for g in self.groups if g[1] >> low_bits(g[1]) == base]
            if not parts:
                continue
            digits = torch.cat(parts).int()
            whole = len(digits) // size * size
            powers = base ** torch.arange(size, dtype=torch.int32).reshape(1, -1, 1)
            bits.append(bits_of((digits[:whole].unflatten(0, (-1, size)) * powers).sum(1), group_bits[-1]))
            if rest := len(digits) - whole:
                bits.append(bits_of((digits[whole:] * powers[0, :rest]).sum(0)[None], group_bits[rest - 1]))
        bits.append(bits[0].new_zeros(8 * self.row_bytes - sum(map(len, bits)), codes.shape[1]))
        rows = torch.cat(bits).unflatten(0, (-1, 8)) << torch.arange(8, dtype=torch.uint8).reshape(1, -1, 1)
        return rows.sum(1, dtype=torch.uint8).T.contiguous()

    def unpack(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Tokens from codes as bytes."""
        values = torch.empty(codes.shape, dtype=torch.float32)
        for members, _, centroids, _ in self.groups:
            values[members] = centroids.gather(1, codes[members].long())
        return self.mean + scale.float()[:, None] * (values[: self.synthesis.shape[0]].T @ self.synthesis)


def check(x: torch.Tensor, tables: KltTables, torch_klt: TorchKlt) -> None:
    """Stops when what will be timed is wrong."""
    rows, few = compress_klt(x, tables), x[:64]
    ops.force_implementation("reference")
    expected = compress_klt(few, tables)
    unpacked = unpack_klt(expected, tables)
    ops.force_implementation("")
    if not torch.equal(rows.blocks[0][:64], expected.blocks[0]):
        raise SystemExit("bytes differ from the reference")
    if not torch.equal(unpack_klt(rows, tables)[:64], unpacked):
        raise SystemExit("unpacked tokens differ from the reference")
    # Another order of sums: few codes lie on the other side of their boundary.
    differ = (torch_klt.pack(*torch_klt.compress(x)) != rows.blocks[0]).float().mean()
    if differ > 0.001:
        raise SystemExit(f"torch's rows differ in {differ:.2%} of the bytes")


def bench_case(shape: tuple[int, int], seconds: float) -> list[dict]:
    """Times compress and unpack of one shape; returns their rows."""
    tables = make_tables(shape[1])
    torch_klt = TorchKlt(tables)
    x = torch.randn(shape)
    check(x, tables, torch_klt)
    rows, out = compress_klt(x, tables), torch.empty_like(x)
    codes = torch_klt.compress(x)
    table = tables.blocks[0]
    functions = {
        "compress": (lambda: compress_klt(x, tables), lambda: torch_klt.pack(*torch_klt.compress(x))),
        "unpack": (lambda: unpack_klt(rows, tables, out=out), lambda: torch_klt.unpack(*codes)),
    }
    results = []
    for name, (ours, theirs) in functions.items():
        times = time_interleaved(
            {"kvpack": ours, "torch": theirs, "torch's product alone": lambda: x @ table.analysis}, 300, seconds
        )
        summaries = {key: summarize(values) for key, values in times.items()}
        median = summaries["kvpack"]["median_s"]
        columns = table.coefficients if name == "compress" else table.coded
        implementation = ops.explain(f"{name}_klt").split(" runs ")[1].split(":")[0]
        results.append(
            {
                "case": f"{name}_klt/{rows.bits_per_element:.2f} bits/{list(shape)}/{implementation}",
                "ms": median * 1e3,
                "gflop_per_s": 2 * shape[0] * shape[1] * columns / median / 1e9,
                "times_torch": summaries["torch"]["median_s"] / median,
                "times_torch_best": summaries["torch"]["min_s"] / summaries["kvpack"]["min_s"],
                "product_share": summaries["torch's product alone"]["median_s"] / median,
                "seconds": summaries,
            }
        )
    return results


def main() -> None:
    """Runs the cases, prints a line each, writes benches/results/klt.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the small shape, one second a case")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for shape in SHAPES[:1] if arguments.quick else SHAPES:
        for row in bench_case(shape, 1.0 if arguments.quick else 15.0):
            results.append(row)
            mine = row["seconds"]["kvpack"]
            print(
                f"{row['case']:52} {row['ms']:8.2f} ms ({mine['min_s'] * 1e3:.2f} to {mine['max_s'] * 1e3:.2f})"
                f" {row['gflop_per_s']:6.0f} GFLOP/s {row['times_torch']:6.1f} times torch"
                f" ({row['times_torch_best']:.1f} at best); torch's product alone takes {row['product_share']:.0%}",
                flush=True,
            )
    if not arguments.no_write:
        print("written to", write_results("klt", " ".join(["python", *sys.argv]), results))


if __name__ == "__main__":
    main()
