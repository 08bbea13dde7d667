"""Compressing to tiles, unpacking and checking them on CUDA: the bits of the CPU's reference in every tensor."""

from dataclasses import replace

import pytest
import torch
from cuda_tensors import AGAINST_REFERENCE, SEED, WORDS, assert_same_bits

from kvpack import _native, compress_tile64, ops, unpack_tile64
from kvpack.tile64 import TENSOR_NAMES, workspace_of
from kvpack.tiles import allocate_tile64

pytestmark = AGAINST_REFERENCE

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BITS = [16, 8, 4, 2, 1]
KINDS = ["key", "value"]


def fill(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """CPU tensor; every kind is there for a branch that it reaches."""
    generator = torch.Generator().manual_seed(hash((SEED, *shape)) % 2**63)
    sample = torch.randn(shape, generator=generator)
    chance = torch.rand(shape, generator=generator)
    t, c = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])
    return {
        "normal": lambda: sample,
        "channels of different size": lambda: sample * torch.exp2(c % 13 - 6.0),  # guesses of thresholds miss
        "heavy tails": lambda: sample**5,
        "ties": lambda: (sample * 2).round() / 2,
        "mostly ties": lambda: torch.where((t * 31 + c * 17) % 23 == 0, sample, 0.75),
        "constant": lambda: torch.full(shape, -1.25),
        "above zero": lambda: 5 + sample.abs() * 0.01,  # codes far from their zero: boundaries are close
        "zeros of both signs": lambda: torch.where(chance < 0.4, 0.0, torch.where(chance < 0.8, -0.0, sample)),
        "few survivors": lambda: torch.where(chance < 0.05, sample, 0.0),
        "denormals": lambda: sample * (1e-6 if dtype == torch.float16 else 1e-39),
        "lost in float16": lambda: sample * 1e-8,  # float32 that rounds to zero survives all the same
        "nan and infinities": lambda: torch.where(
            chance < 0.01, torch.nan, torch.where(chance < 0.02, -torch.inf, sample)
        ),
        "nan nearly everywhere": lambda: torch.where(chance < 0.6, -torch.nan, sample),
        "one loud token": lambda: torch.where(t == 5, 1000 * sample, sample),
    }[kind]().to(dtype)


FILLS = [
    "normal", "channels of different size", "heavy tails", "ties", "mostly ties", "constant", "above zero",
    "zeros of both signs", "few survivors", "denormals", "lost in float16", "nan and infinities",
    "nan nearly everywhere", "one loud token",
]  # fmt: skip


def assert_same_tiles(expected, actual, what: str = "") -> None:
    """Compares all tensors; of the payload what the tiles take."""
    assert actual.device.startswith("cuda")
    for name in TENSOR_NAMES:
        want, got = getattr(expected, name), getattr(actual.trim(copy=False), name)
        assert want.shape == got.shape, f"{what} {name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        assert_same_bits(want, got, f"{what} {name}")


def check(x: torch.Tensor, on_gpu: torch.Tensor | None = None, **options) -> None:
    """Compresses x on both sides and unpacks it to every type."""
    expected = compress_tile64(x, **options)
    assert x.numel() == 0 or ops.last_implementation() == "reference"
    on_gpu = x.cuda() if on_gpu is None else on_gpu
    if options.get("channel_scores") is not None:
        options["channel_scores"] = options["channel_scores"].cuda()
    poison_device_memory()
    actual = compress_tile64(on_gpu, **options)
    assert ops.last_implementation() == "cuda"
    what = f"{tuple(x.shape)} {options}"
    assert_same_tiles(expected, actual, what)
    for dtype in DTYPES:
        dense = torch.full(x.shape, -1, dtype=WORDS[dtype.itemsize], device="cuda").view(dtype)
        unpack_tile64(actual, out=dense)
        assert_same_bits(unpack_tile64(expected, dtype=str(dtype).removeprefix("torch.")), dense, f"{what} to {dtype}")


def poison_device_memory() -> None:
    """Leaves ones in the memory that the next allocations get: neither outputs nor workspace start as zeros."""
    blocks = [torch.full((2**power,), -1, dtype=torch.int8, device="cuda") for power in range(9, 25) for _ in range(2)]
    del blocks


# --- compressing and unpacking ---------------------------------------------------------------------------------------

SHAPES = {
    "no batch": (0, 64, 64),
    "no token": (2, 0, 128),
    "one token": (1, 1, 64),
    "one below a block": (3, 63, 128),
    "a block": (2, 64, 256),
    "one above a block": (2, 65, 128),
    "several blocks and heads": (2, 3, 200, 128),
    "head_dim 64": (3, 130, 64),
    "head_dim 256": (2, 130, 256),
    "more blocks than a scan has threads": (17, 64 * 64, 64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_the_bits_of_the_reference(name, bits, kind, dtype):
    if SHAPES[name][0] == 17 and (bits not in (16, 2) or dtype != torch.float16):
        pytest.skip("the scan does not depend on it, and the reference takes its time")
    check(fill("normal", SHAPES[name], dtype), kind=kind, bits=bits, sparsity=0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["exact", "kth_value"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILLS)
def test_every_filling_has_the_bits_of_the_reference(name, kind, rule, dtype):
    for head_dim, bits in ((64, 1), (128, 2), (128, 16), (256, 8), (64, 16), (128, 4)):
        x = fill(name, (2, 100, head_dim), dtype)
        for sparsity in (0.7, 0.5):
            check(x, kind=kind, bits=bits, sparsity=sparsity, rule=rule)


@pytest.mark.parametrize("rule", ["exact", "kth_value"])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.01, 0.3, 0.9, 0.99, 0.9999])
def test_every_sparsity_has_the_bits_of_the_reference(sparsity, rule):
    for dtype in DTYPES:
        for head_dim in (64, 128, 256):
            for name in ("normal", "ties", "few survivors"):
                x = fill(name, (1, 70, head_dim), dtype)
                check(x, kind="key", bits=2, sparsity=sparsity, rule=rule)
                check(x, kind="value", bits=16, sparsity=sparsity, rule=rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_channel_scores_rank_as_in_the_reference(kind, dtype):
    x = fill("normal", (2, 3, 70, 128), dtype)
    shared, own = torch.linspace(0, 2, 128), torch.rand(2, 3, 128, generator=torch.Generator().manual_seed(SEED))
    for scores in (shared, own):
        check(x, kind=kind, bits=2, sparsity=0.7, channel_scores=scores)
        check(x, kind=kind, bits=16, sparsity=0.7, rule="kth_value", channel_scores=scores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [16, 2])
def test_strides_and_unaligned_starts_change_nothing(bits, dtype):
    x = fill("normal", (2, 3, 70, 128), dtype)
    b, h, t, d = x.shape
    views = {
        "tokens outside heads": torch.empty(b, t, h, d, dtype=dtype, device="cuda").permute(0, 2, 1, 3),
        "rows of 136": torch.empty(b, h, t, d + 8, dtype=dtype, device="cuda")[..., 8:],
        "rows of 131, unaligned": torch.empty(b, h, t, d + 3, dtype=dtype, device="cuda")[..., 1 : d + 1],
        "a window": torch.empty(b, h, t + 9, d, dtype=dtype, device="cuda")[:, :, 5 : t + 5],
    }
    for view in views.values():
        check(x, view.copy_(x), kind="key", bits=bits, sparsity=0.7)
        tiles = compress_tile64(x.cuda(), "value", bits=bits, sparsity=0.7)
        view.fill_(torch.nan)
        unpack_tile64(tiles, out=view)
        assert_same_bits(unpack_tile64(compress_tile64(x, "value", bits=bits, sparsity=0.7)), view, "strided out")
    one = x[:1, :1, :1].expand(2, 3, 70, 128)  # strides of 0
    check(one, x[:1, :1, :1].cuda().expand(2, 3, 70, 128), kind="value", bits=bits, sparsity=0.5)


def test_every_run_gives_the_same_bits():
    x = fill("normal", (8, 4096, 128), torch.float16).cuda()
    first = compress_tile64(x, "key", bits=2, sparsity=0.7)
    for _ in range(10):
        again = compress_tile64(x, "key", bits=2, sparsity=0.7)
        for name in TENSOR_NAMES:
            used = slice(0, first.payload_elements) if name == "payload" else slice(None)
            assert torch.equal(getattr(first, name)[used], getattr(again, name)[used]), name


# --- payloads that are too small, and what is used -------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_nothing_is_written_past_a_payload_that_is_too_small_and_used_says_what_it_takes(bits):
    x = fill("normal", (3, 130, 128), torch.float16)
    whole = compress_tile64(x, "key", bits=bits, sparsity=0.7)
    room = allocate_tile64(x.cuda(), "key", bits=bits, sparsity=0.7)
    for capacity in (whole.payload_elements, whole.payload_elements // 16 * 8, 8, 0):
        memory = torch.full_like(room.payload.view(WORDS[room.payload.element_size()]), -1)
        tiles = replace(room, payload=memory.view(room.payload.dtype)[:capacity])
        used = torch.zeros(1, dtype=torch.int64, device="cuda")
        compress_into(tiles, x.cuda(), used)
        assert used.item() == whole.payload_elements
        assert_same_bits(whole.payload[:capacity], tiles.payload, f"{capacity} elements")
        assert (memory[capacity:] == -1).all(), f"written past {capacity} elements"
        assert_same_bits(whole.offsets, tiles.offsets, "offsets")


def compress_into(tiles, x, used) -> None:
    """compress_tile64 of the C ABI, whose payload may be too small."""
    library = _native.library
    sizes = (tiles.bits, tiles.batches, tiles.tokens, tiles.head_dim)
    workspace = workspace_of(library.kvpack_tile64_workspace_bytes, x, *sizes)
    options = _native.Tile64Options(0.7, 0, 0, None, 0)
    view = _native.view
    _native.check(
        library.kvpack_compress_tile64(
            view(x, "x"), options, tiles.native, view(workspace, "workspace"), view(used, "used"), _native.stream_of(x)
        )
    )


def test_compressing_can_be_captured_in_a_graph_and_never_synchronises():
    x = fill("normal", (2, 130, 128), torch.float16).cuda()
    tiles = allocate_tile64(x, "value", bits=2, sparsity=0.7)
    used = torch.zeros(1, dtype=torch.int64, device="cuda")
    compress_into(tiles, x, used)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compress_into(tiles, x, used)
    changed = fill("heavy tails", (2, 130, 128), torch.float16)
    x.copy_(changed)
    graph.replay()
    assert_same_tiles(compress_tile64(changed, "value", bits=2, sparsity=0.7), tiles, "replayed")


# --- bytes from outside ----------------------------------------------------------------------------------------------


def broken(tiles, name: str, place: tuple[int, ...], value):
    """The tiles with one number changed."""
    part = getattr(tiles, name).clone()
    part[place] = value
    return replace(tiles, **{name: part})


FAULTS = {
    "offset backwards": (16, "offsets", (1, 7), 0),
    "offset below zero": (2, "offsets", (1, 7), -1),
    "start below zero": (16, "starts", (1,), -1),
    "past the end": (16, "starts", (2,), 1 << 30),
    "far past the end": (2, "offsets", (2, 255), (1 << 31) - 1),
    "last offset": (16, "offsets", (2, 256), 3),
    "bitmap with too many": (4, "bitmaps", (1, 100), -1),
    "bitmap with too few": (16, "bitmaps", (1, 100), 0),
    "scale is infinite": (8, "scales", (0, 9), float("inf")),
    "scale is no number": (8, "scales", (0, 9), float("nan")),
    "zero is no number": (1, "zeros", (2, 200), float("nan")),
    "zero is not whole": (1, "zeros", (2, 200), 0.5),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_as_the_reference_names_it(name):
    bits, part, place, value = FAULTS[name]
    tiles = broken(compress_tile64(fill("normal", (3, 128, 128), torch.float16), "key", bits=bits, sparsity=0.7),
                   part, place, value)  # fmt: skip
    with pytest.raises(ValueError) as expected:
        tiles.validate()
    with pytest.raises(ValueError) as actual:
        tiles.to("cuda").validate()
    assert ops.last_implementation() == "cuda"
    assert str(actual.value) == str(expected.value)


def test_the_first_of_many_faults_is_named():
    tiles = compress_tile64(fill("normal", (9, 640, 128), torch.float16), "value", bits=2, sparsity=0.7)
    tiles.to("cuda").validate()
    for place in ((8, 1279), (5, 3), (5, 2), (0, 700)):
        tiles = broken(tiles, "scales", place, float("nan"))
        with pytest.raises(ValueError, match=f"batch {place[0]}, tile {place[1]}: "):
            tiles.to("cuda").validate()


@pytest.mark.parametrize("bits", BITS)
def test_hostile_bytes_unpack_to_something_without_a_read_outside(bits):
    tiles = compress_tile64(fill("normal", (3, 128, 128), torch.float16), "value", bits=bits, sparsity=0.7).to("cuda")
    generator = torch.Generator(device="cuda").manual_seed(SEED)
    for name in ("offsets", "starts", "bitmaps", "scales"):
        part = getattr(tiles, name)
        if part.numel() == 0:
            continue
        noise = torch.randint(-(2**31), 2**31 - 1, part.shape, device="cuda", generator=generator)
        wild = noise.int().view(torch.float32) if part.is_floating_point() else noise.to(part.dtype) * 0x10003
        out = unpack_tile64(replace(tiles, **{name: wild}))
        torch.cuda.synchronize()
        assert out.shape == tiles.shape
    empty = replace(tiles, payload=tiles.payload[:0])
    assert torch.isfinite(unpack_tile64(empty)).all()
