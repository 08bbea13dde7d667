"""Transform-coded rows on CUDA: the law, the CPU's bits from `cuda_chains`, the stated bound from `cuda`."""

from functools import cache

import numpy as np
import pytest
import torch
from cuda_tensors import GPU, PADDED, PLAIN, STRIDED, Guarded, assert_same_bits, fill, place
from klt_decoder import decode_row, make_parts

from kvpack import ops
from kvpack.klt import KltTable, KltTables, check_klt, compress_klt, simulate_klt, unpack_klt

pytestmark = GPU
IMPLEMENTATIONS = ["cuda_chains", "cuda_mma", "cuda"]
ALL_LEVELS = [64, 32, 20, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2]


def mixed(count: int, dropped: int) -> list[int]:
    """`count` coefficients of all numbers of levels, and some that only enter the scale."""
    return [ALL_LEVELS[k * 13 // count] for k in range(count)] + [1] * dropped


# Around the tiles of both products (64 and 128 rows and columns, 16 and 32 inputs) and the warps of the codec.
CASES = {
    "one channel": (1, [2]),
    "nothing coded": (8, [1, 1]),
    "below a tile": (33, mixed(26, 5)),
    "a head": (64, mixed(41, 9)),
    "SmolLM2": (192, mixed(127, 20)),
    "a tile of columns": (128, mixed(128, 0)),
    "one more than a tile": (129, mixed(129, 0)),
    "trits": (80, [3] * 80),
    "large": (1024, mixed(619, 40)),
    "many pieces": (1200, [20] * 600 + [12] * 590),
}


# Few and many tokens of every case; the other types and layouts of small cases that take all branches of an edge.
UNPACKED = [
    *((name, tokens, torch.float16, PLAIN) for name in CASES for tokens in (1, 128, 300)),
    *(
        (name, 135, dtype, layout)
        for name in ("below a tile", "trits", "one more than a tile", "SmolLM2")
        for dtype, layout in (
            *((dtype, PLAIN) for dtype in (torch.bfloat16, torch.float32, torch.float64)),
            *((dtype, PADDED) for dtype in (torch.float16, torch.float32)),
            *((dtype, STRIDED) for dtype in (torch.bfloat16, torch.float64)),
        )
    ),
    *((name, 5, dtype, PADDED) for name in ("large", "many pieces") for dtype in (torch.float16, torch.float32)),
]


@cache
def make_tables(name: str, alignment: int = 2) -> KltTables:
    channels, levels = CASES[name]
    return KltTables((KltTable(**make_parts(channels, levels), row_alignment=alignment),))


def on_reference(function):
    """Runs something on the CPU's reference."""
    ops.force_implementation("reference")
    try:
        return function()
    finally:
        ops.force_implementation("")


@pytest.mark.parametrize(("name", "tokens", "dtype", "layout"), UNPACKED)
def test_unpacking_gives_what_simulation_gives(implementation, name, tokens, dtype, layout):
    tables = make_tables(name).to("cuda")
    source = place(fill("normal", tokens, tables.channels, dtype), layout)
    rows = compress_klt(source.view, tables)
    assert ops.last_implementation() == implementation or tables.row_bytes == 0
    target = Guarded(source.view.shape, dtype, layout)
    unpack_klt(rows, tables, out=target.view)
    simulated = Guarded(source.view.shape, dtype, layout)
    simulate_klt(source.view, tables, out=simulated.view)
    assert_same_bits(target.view, simulated.view, name)
    assert target.guards_are_intact() and simulated.guards_are_intact() and source.guards_are_intact()
    check_klt(rows, make_tables(name))
    simulate_klt(source.view, tables, out=source.view)
    assert_same_bits(target.view, source.view, "in place")
    assert source.guards_are_intact()


@pytest.mark.parametrize("kind", ["normal", "denormal", "huge", "zeros", "constant"])
@pytest.mark.parametrize("name", CASES)
def test_chains_give_the_bytes_and_floats_of_the_reference(name, kind):
    tables = make_tables(name)
    x = fill(kind, 70 if tables.channels < 1000 else 9, tables.channels, torch.float32)
    expected = on_reference(lambda: compress_klt(x, tables))
    unpacked = on_reference(lambda: unpack_klt(expected, tables))
    ops.force_implementation("cuda_chains")
    try:
        on_gpu = tables.to("cuda")
        rows = compress_klt(x.cuda(), on_gpu)
        for a, b in zip(expected.blocks, rows.blocks, strict=True):
            assert torch.equal(a, b.cpu()), f"{(a != b.cpu()).sum()} bytes differ"
        assert_same_bits(unpacked, unpack_klt(rows, on_gpu), name)
    finally:
        ops.force_implementation("")


@pytest.mark.parametrize("name", CASES)
def test_products_stay_within_the_bound(implementation, name):
    """docs/decisions/0007: a code moves only where the bound around the coefficient holds a boundary, and by one."""
    tables = make_tables(name)
    table = tables.blocks[0]
    if table.coded == 0:
        pytest.skip("no codes to compare")
    tokens = 150 if table.channels < 1000 else 20
    x = fill("normal", tokens, table.channels, torch.float32)
    on_gpu = tables.to("cuda")
    rows = compress_klt(x.cuda(), on_gpu)
    centred = (x.numpy() - table.mean).astype(np.float64)
    z = centred @ table.analysis
    unit = 3 * 2.0**-18 + (3 * table.channels + 32) * 2.0**-23
    bound = unit * (np.abs(centred) @ np.abs(table.analysis.astype(np.float64)))
    scales = np.sqrt((z[:, table.in_scale == 1] ** 2).mean(1))
    levels = table.levels[table.levels > 1].tolist()
    for t, row in enumerate(rows.blocks[0].cpu().numpy()):
        scale, codes = decode_row(row.tobytes(), levels)
        assert abs(scale - scales[t]) <= scales[t] * (2**-4 + 2**-11) + bound[t].max()
        first = 0
        for k, (code, count) in enumerate(zip(codes, levels, strict=True)):
            centroids = table.centroids[first : first + count].astype(np.float64)
            distances = np.abs(z[t, k] / scale - centroids)
            slack = 2 * bound[t, k] / scale + 1e-6 * (abs(z[t, k]) / scale + np.abs(centroids).max())
            assert distances[code] <= distances.min() + slack, (t, k)
            first += count
    exact, limit = exact_tokens(table, rows)
    unpacked = unpack_klt(rows, on_gpu).cpu().double().numpy()
    assert (np.abs(unpacked - exact) <= limit).all()


def exact_tokens(table, rows):
    """What rows stand for in float64, and how far a GPU's floats may lie from it (docs/decisions/0007)."""
    levels = table.levels[table.levels > 1].tolist()
    starts = np.cumsum([0, *levels[:-1]])
    decoded = [decode_row(row.tobytes(), levels) for row in rows.blocks[0].cpu().numpy()]
    scales = np.array([[scale] for scale, _ in decoded])
    values = np.stack([table.centroids[starts + codes] for _, codes in decoded])
    synthesis = table.synthesis.astype(np.float64)
    exact = table.mean + scales * (values @ synthesis)
    unit = 3 * 2.0**-18 + (3 * len(levels) + 32) * 2.0**-23
    limit = unit * scales * (np.abs(values) @ np.abs(synthesis))
    return exact, limit + 2.0**-22 * (np.abs(exact) + np.abs(table.mean))


def on_gpu_with(implementation, function):
    """Runs something with an implementation of CUDA, and tells the kernels that it started."""
    ops.force_implementation(implementation)
    try:
        function()  # the profiler may miss the first kernels of a process
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = function()
            torch.cuda.synchronize()
        assert ops.last_implementation() == implementation
    finally:
        ops.force_implementation("")
    return result, " ".join(event.key for event in profile.key_averages())


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("name", ["one more than a tile", "SmolLM2", "large"])
def test_both_tensor_core_products_agree(name, tokens):
    """Both add the same products, 16 inputs after 16; how an instruction adds its 16 is the hardware's.

    So codes next to a boundary may differ, and floats by both their bounds.
    """
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma exists on Hopper alone; elsewhere both are the same code")
    tables = make_tables(name).to("cuda")
    x = fill("normal", tokens, tables.channels, torch.float32).cuda()
    mma, kernels = on_gpu_with("cuda_mma", lambda: compress_klt(x, tables))
    assert "tensor::product_kernel" in kernels and "wgmma::product_kernel" not in kernels
    wgmma, _ = on_gpu_with("cuda", lambda: compress_klt(x, tables))
    differ = (mma.blocks[0] != wgmma.blocks[0]).float().mean().item()
    assert differ <= 0.002, f"{differ} of the bytes differ"
    _, limit = exact_tokens(make_tables(name).blocks[0], mma)
    a, _ = on_gpu_with("cuda_mma", lambda: unpack_klt(mma, tables, out=torch.empty_like(x)))
    b, _ = on_gpu_with("cuda", lambda: unpack_klt(mma, tables, out=torch.empty_like(x)))
    assert (np.abs((a.double() - b.double()).cpu().numpy()) <= 2 * limit).all()


@pytest.mark.parametrize(("name", "tokens"), [("SmolLM2", 1), ("SmolLM2", 20000), ("large", 9000)])
def test_hopper_multiplies_with_wgmma(name, tokens):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma exists on Hopper alone")
    tables = make_tables(name).to("cuda")
    x = torch.randn(tokens, tables.channels).half().cuda()
    rows, analysis = on_gpu_with("cuda", lambda: compress_klt(x, tables))
    _, synthesis = on_gpu_with("cuda", lambda: unpack_klt(rows, tables, out=x))
    _, both = on_gpu_with("cuda", lambda: simulate_klt(x, tables))
    for kernels in (analysis, synthesis, both):
        assert "wgmma::product_kernel" in kernels and "tensor::product_kernel" not in kernels, kernels


@pytest.mark.parametrize("padding", [0, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bits_do_not_depend_on_how_tokens_are_stored(implementation, dtype, padding):
    """Where rows allow, tokens are written 16 bytes at a time."""
    tables = make_tables("SmolLM2").to("cuda")
    rows = compress_klt(torch.randn(333, 192, generator=torch.Generator().manual_seed(1)).cuda(), tables)
    expected = unpack_klt(rows, tables, out=torch.empty(192, 333, dtype=dtype, device="cuda").t())
    whole = torch.full((333, 192 + padding), 7.0, dtype=dtype, device="cuda")
    unpack_klt(rows, tables, out=whole[:, padding:])
    assert_same_bits(expected.contiguous(), whole[:, padding:].contiguous(), "16 bytes at a time")
    assert (whole[:, :padding] == 7.0).all()


def random_levels(seed: int) -> list[int]:
    """Numbers of levels of which some are rare, some missing and some frequent."""
    random = np.random.default_rng(seed)
    counts = random.choice([0, 1, 2, 3, 5, 9, 30], len(ALL_LEVELS))
    return [levels for levels, count in zip(ALL_LEVELS, counts, strict=True) for _ in range(count)] or [2]


# 300 tokens go through tiles of 32; quads of coefficients and units of a row begin and end anywhere. The last table's
# tiles fit into no multiprocessor.
TILED = {
    **{f"only {levels}": [levels] * 43 for levels in ALL_LEVELS},
    **{f"random {seed}": random_levels(seed) for seed in range(12)},
    "wide": [20] * 900 + [3] * 900,
}


@pytest.mark.parametrize("name", TILED)
def test_tiles_have_the_bytes_of_the_reference(name):
    levels = TILED[name]
    channels = len(levels) + 3
    tables = KltTables((KltTable(**make_parts(channels, levels + [1] * 2)),))
    x = fill("normal", 300 if channels < 1000 else 265, channels, torch.float32)
    x[3] = 0.0
    x[33] *= 1e-30
    x[299 % len(x)] *= 1e30
    some = [0, 3, 31, 32, 33, 100, 263, 264]
    expected = on_reference(lambda: compress_klt(x[some], tables)).blocks[0]
    on_gpu = tables.to("cuda")
    compressed, kernels = on_gpu_with("cuda_chains", lambda: compress_klt(x.cuda(), on_gpu))
    assert ("pack_tiles_kernel" in kernels) == (name != "wide"), kernels
    rows = compressed.blocks[0].cpu()
    assert torch.equal(rows[some], expected), f"{(rows[some] != expected).sum()} bytes differ"


@pytest.mark.parametrize("tokens", [33, 133])
@pytest.mark.parametrize("protected", [0, 1, 40])
def test_batches_and_protected_tokens(implementation, protected, tokens):
    tables = KltTables(make_tables("a head").blocks + make_tables("below a tile", 16).blocks).to("cuda")
    x = torch.randn(3, tokens, 97, generator=torch.Generator().manual_seed(1)).cuda()
    rows = compress_klt(x, tables, protected_tokens=protected)
    simulated = simulate_klt(x, tables, protected_tokens=protected)
    assert torch.equal(unpack_klt(rows, tables), simulated)
    assert torch.equal(simulated[:, :protected], x[:, :protected])
    one = compress_klt(x[1], tables, protected_tokens=protected)
    for a, b in zip(one.blocks, rows.blocks, strict=True):
        assert torch.equal(a, b[1]), "a token's bytes depend on its neighbours"


@pytest.mark.parametrize("width", [64, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_keys_are_rotated(implementation, dtype, width):
    tables = make_tables("SmolLM2").to("cuda")
    x = torch.randn(2, 35, 192, generator=torch.Generator().manual_seed(1)).cuda().to(dtype)
    angles = torch.randn(35, width // 2, generator=torch.Generator().manual_seed(2)).repeat(1, 2)
    cos, sin = angles.cos().cuda(), angles.sin().cuda()
    rows = compress_klt(x, tables)
    plain = unpack_klt(rows, tables, out=torch.empty(2, 35, 192, device="cuda")).reshape(2, 35, 3, 64)
    turned, rest = plain[..., :width], plain[..., width:]
    halves = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), -1)
    expected = torch.cat((turned * cos[:, None] + halves * sin[:, None], rest), -1).reshape(2, 35, 192).to(dtype)
    assert_same_bits(expected, unpack_klt(rows, tables, rope=(cos, sin), head_dim=64), "rotated")


def test_chunks_join_without_a_seam(implementation):
    tables = make_tables("a head").to("cuda")
    x = torch.randn(40000, 64, generator=torch.Generator().manual_seed(1)).cuda()
    rows = compress_klt(x, tables)
    for first in (0, 32767, 32768, 39999):
        alone = compress_klt(x[first : first + 1], tables)
        assert torch.equal(alone.blocks[0][0], rows.blocks[0][first])
    assert torch.equal(unpack_klt(rows, tables), simulate_klt(x, tables))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "tokens"), [("SmolLM2", 20000), ("a head", 40000), ("large", 3000), ("large", 9000)])
def test_many_tokens_have_the_bytes_of_few(implementation, name, tokens, dtype):
    """Large calls take other tiles and share the codec's work out otherwise."""
    tables = make_tables(name).to("cuda")
    x = torch.randn(tokens, tables.channels, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    rows = compress_klt(x, tables).blocks[0]
    for first, count in ((0, 1), (63, 2), (1000, 300), (tokens - 65, 65)):
        few = compress_klt(x[first : first + count], tables).blocks[0]
        assert torch.equal(few, rows[first : first + count]), f"tokens {first} to {first + count}"
    simulated = simulate_klt(x, tables)
    assert torch.equal(unpack_klt(compress_klt(x, tables), tables), simulated)
    assert torch.equal(simulate_klt(x[1000:1009], tables), simulated[1000:1009])
    ops.force_implementation("cuda_chains")
    exact = compress_klt(x, tables).blocks[0]
    assert (rows != exact).float().mean() < 0.001


def test_hostile_rows_decode_to_something(implementation):
    tables = make_tables("SmolLM2").to("cuda")
    rows = compress_klt(torch.randn(64, 192).cuda(), tables)
    rows.blocks[0].random_(0, 256)
    unpack_klt(rows, tables)
    torch.cuda.synchronize()


def test_numbers_that_are_not_finite_stay_in_their_token(implementation):
    tables = make_tables("SmolLM2").to("cuda")
    x = torch.randn(130, 192).cuda()
    clean = compress_klt(x, tables).blocks[0].clone()
    x[7, 3], x[128, 0] = torch.nan, torch.inf
    rows = compress_klt(x, tables)
    others = [t for t in range(130) if t not in (7, 128)]
    assert torch.equal(rows.blocks[0][others], clean[others])
    check_klt(rows, make_tables("SmolLM2"))


def test_calls_can_be_captured(implementation):
    tables = make_tables("SmolLM2").to("cuda")
    x = torch.randn(200, 192).cuda()
    out = torch.empty_like(x)
    simulate_klt(x, tables, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        simulate_klt(x, tables, out=out)
    x.copy_(torch.randn(200, 192))
    graph.replay()
    assert torch.equal(out, simulate_klt(x, tables))
