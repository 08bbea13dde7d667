"""Tiles from Python: bytes against a second decoder in numpy, joining, products and attention against float64."""

import numpy as np
import pytest
import tile_decoder
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_parameters import tile_parameters

import kvpack
from kvpack import (
    Tile64,
    attend_tile64,
    compress_tile64,
    concat_tile64,
    multiply_keys,
    multiply_values,
    ops,
    unpack_tile64,
)
from kvpack.tile64 import TENSOR_NAMES

IMPLEMENTATIONS = sorted(
    {
        row["name"]
        for row in ops.list_implementations()
        if row["operation"] == "unpack_tile64" and row["device"] == "cpu"
    }
)
KINDS = ("key", "value")
ALL_BITS = (1, 2, 4, 8, 16)
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 2e-3, torch.float32: 1e-5}
"""Largest relative error (norms) against float64 on values in float32: docs/numerics.md section 8. bfloat16 rounds
by up to 2^-8, once in the output and, where an implementation multiplies in that type, once in the values of codes."""


def random_matrices(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def decode(tiles: Tile64) -> np.ndarray:
    """float32 [batches, tokens, head_dim] by the second decoder."""
    parts = {name: np.asarray(part.float() if part.dtype == torch.bfloat16 else part) for name, part in
             zip(TENSOR_NAMES, [torch.as_tensor(part) for part in tiles.tensors], strict=True)}  # fmt: skip
    wide = {name: part for name, part in parts.items() if name not in ("starts", "scales", "zeros")}
    if tiles.bits == 16:
        return tile_decoder.decode_halves(tiles.kind, tiles.tokens, tiles.head_dim, **wide, starts=parts["starts"])
    grids = {"scales": parts["scales"], "zeros": parts["zeros"]}
    return tile_decoder.decode_codes(tiles.kind, tiles.bits, tiles.tokens, tiles.head_dim, **wide, **grids)


def assert_same_tiles(one: Tile64, other: Tile64) -> None:
    assert (one.kind, one.bits, one.shape, one.dtype) == (other.kind, other.bits, other.shape, other.dtype)
    for name, a, b in zip(TENSOR_NAMES, one.tensors, other.tensors, strict=True):
        a, b = (torch.as_tensor(x) for x in (a, b))
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.numel() else True, name


def relative_error(actual, expected) -> float:
    actual, expected = (torch.as_tensor(x).double() for x in (actual, expected))
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


@settings(max_examples=40, deadline=None)
@given(tile_parameters)
def test_tiles_decode_to_what_the_rules_of_the_document_say(case):
    kind, bits, tokens, head_dim, sparsity, seed = case
    x = random_matrices(2, tokens, head_dim, seed=seed, dtype=np.float16)
    x[x > 1.5] = 0  # zeros in the input get no bit
    tiles = compress_tile64(x, kind, sparsity=sparsity, bits=bits)
    pruned = tile_decoder.prune_exact(x, sparsity).astype(np.float32)
    if bits == 16:
        expected = pruned
    else:
        expected = np.stack([tile_decoder.quantize_tiles(kind, bits, matrix) for matrix in pruned])
    np.testing.assert_array_equal(decode(tiles), expected)
    np.testing.assert_array_equal(unpack_tile64(tiles, dtype="float32"), expected)
    assert tiles.validate() is tiles


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_implementation_makes_the_same_bytes(implementation, kind, bits, dtype):
    x = torch.from_numpy(random_matrices(2, 3, 150, 128)).to(dtype)
    tiles = compress_tile64(x, kind, sparsity=0.7, bits=bits)
    assert ops.last_implementation() == implementation
    unpacked = unpack_tile64(tiles)
    assert ops.last_implementation() == implementation
    assert unpacked.dtype == dtype and unpacked.shape == x.shape
    ops.force_implementation("reference")
    assert_same_tiles(tiles, compress_tile64(x, kind, sparsity=0.7, bits=bits))
    assert torch.equal(unpacked.float(), torch.from_numpy(decode(tiles)).view(x.shape).to(dtype).float())


@pytest.mark.parametrize("bits", [2, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_numpy_torch_and_strides_make_no_difference(kind, bits):
    x = random_matrices(2, 3, 70, 64, dtype=np.float16)
    expected = compress_tile64(x, kind, sparsity=0.5, bits=bits)
    assert isinstance(expected.bitmaps, np.ndarray)
    tokens_first = torch.from_numpy(x).transpose(1, 2).contiguous().transpose(1, 2)
    assert not tokens_first.is_contiguous()
    for view in (torch.from_numpy(x), tokens_first):
        tiles = compress_tile64(view, kind, sparsity=0.5, bits=bits)
        assert_same_tiles(tiles, expected)
        out = torch.full((2, 70, 3, 64), float("nan"), dtype=torch.float16).transpose(1, 2)
        assert unpack_tile64(tiles, out=out) is out
        np.testing.assert_array_equal(out.numpy(), unpack_tile64(expected))


@pytest.mark.parametrize("bits", [2, 16])
def test_the_published_rule_and_scores_choose_what_survives(bits):
    x = random_matrices(2, 70, 64)
    pruned, _ = ops.prune_magnitude(x, 0.7, rule="kth_value")
    published = compress_tile64(x, "key", sparsity=0.7, bits=bits, rule="kth_value")
    assert_same_tiles(published, compress_tile64(pruned, "key", sparsity=0.0, bits=bits))
    scores = np.random.default_rng(1).uniform(size=(2, 64)).astype(np.float32)
    by_batch = compress_tile64(x, "key", sparsity=0.7, bits=bits, channel_scores=scores)
    scored = tile_decoder.prune_exact(x, 0.7, scores[:, None])
    assert_same_tiles(by_batch, compress_tile64(scored.astype(np.float32), "key", sparsity=0.0, bits=bits))
    shared = compress_tile64(x, "key", sparsity=0.7, bits=bits, channel_scores=scores[0])
    scored = tile_decoder.prune_exact(x, 0.7, scores[0])
    assert_same_tiles(shared, compress_tile64(scored.astype(np.float32), "key", sparsity=0.0, bits=bits))


@pytest.mark.parametrize(
    ("bits", "kind", "tokens", "num_bytes"),
    [
        # Two batches of 64 tiles: bitmaps, offsets with one more, starts; 20 survivors take 24 halves.
        (16, "value", 64, 2 * (64 * 8 + 65 * 4 + 4 + 64 * 24 * 2)),
        # Two words of 16 codes hold 20 survivors.
        (2, "value", 64, 2 * 64 * (8 + 4 + 4 + 4 + 2 * 4)),
        (8, "value", 64, 2 * 64 * (8 + 4 + 4 + 4 + 5 * 4)),
        # One token more starts a block of 64 tiles, 63 of them empty.
        (2, "value", 65, 2 * (128 * 20 + 65 * 2 * 4)),
        (2, "value", 0, 0),
    ],
)
def test_bytes_are_counted_honestly(bits, kind, tokens, num_bytes):
    tiles = compress_tile64(random_matrices(2, tokens, 64), kind, sparsity=0.7, bits=bits)
    assert tiles.num_bytes == num_bytes
    assert tiles.payload_elements == tiles.payload.shape[0]
    assert tiles.bits_per_element == (8 * num_bytes / (2 * tokens * 64) if tokens else 0.0)
    assert sum(part.nbytes for part in tiles.tensors) == num_bytes


def test_properties_say_what_was_compressed():
    tiles = compress_tile64(torch.zeros(2, 3, 70, 128, dtype=torch.bfloat16), "value", sparsity=0.5, bits=4)
    assert (tiles.batches, tiles.tokens, tiles.head_dim) == (6, 70, 128)
    assert (tiles.shape, tiles.device, tiles.dtype) == ((2, 3, 70, 128), "cpu", "bfloat16")
    assert tiles.bitmaps.shape == (6, 256) and tiles.payload_elements == 0
    assert tiles.to("cpu").device == "cpu"


@pytest.mark.parametrize("exact_size", [False, True])
def test_the_payload_has_its_real_size_on_the_cpu(exact_size):
    x = torch.from_numpy(random_matrices(2, 70, 64))
    tiles = compress_tile64(x, "key", sparsity=0.7, bits=2, exact_size=exact_size)
    assert tiles.payload.shape[0] == tiles.payload_elements
    assert (tiles.payload.untyped_storage().nbytes() == 4 * tiles.payload_elements) == exact_size


@settings(max_examples=30, deadline=None)
@given(tile_parameters, st.lists(st.integers(0, 2), max_size=3))
def test_joined_tiles_are_the_tiles_of_the_joined_tokens(case, blocks):
    kind, bits, tokens, head_dim, sparsity, seed = case
    lengths = [64 * block for block in blocks] + [tokens]
    x = random_matrices(2, sum(lengths), head_dim, seed=seed, dtype=np.float16)
    for library in (x, torch.from_numpy(x)):
        ends = np.cumsum(lengths)
        parts = [
            compress_tile64(library[:, end - length : end], kind, sparsity=sparsity, bits=bits)
            for end, length in zip(ends, lengths, strict=True)
        ]
        joined = concat_tile64(parts)
        assert_same_tiles(joined, compress_tile64(library, kind, sparsity=sparsity, bits=bits))
        joined.validate()


def test_tiles_that_do_not_fit_together_are_not_joined():
    x = torch.from_numpy(random_matrices(2, 64, 64))
    one = compress_tile64(x, "key", sparsity=0.5, bits=2)
    short = compress_tile64(x[:, :63], "key", sparsity=0.5, bits=2)
    assert concat_tile64([one, short]).tokens == 127
    with pytest.raises(ValueError, match="part 0 has 63 tokens"):
        concat_tile64([short, one])
    with pytest.raises(ValueError, match="part 1 has bits 4; part 0 has 2"):
        concat_tile64([one, compress_tile64(x, "key", sparsity=0.5, bits=4)])
    with pytest.raises(ValueError, match="part 1 has kind value; part 0 has key"):
        concat_tile64([one, compress_tile64(x, "value", sparsity=0.5, bits=2)])
    with pytest.raises(ValueError, match="no tiles"):
        concat_tile64([])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "head_dim", "group", "rows"), [(16, 64, 1, 1), (2, 128, 4, 1), (4, 128, 3, 16), (1, 256, 2, 7)]
)
def test_products_are_those_of_the_unpacked_tiles(implementation, dtype, bits, head_dim, group, rows):
    limit = LIMITS[dtype]
    dense = torch.from_numpy(random_matrices(3, 150, head_dim)).to(dtype)
    keys = compress_tile64(dense, "key", sparsity=0.7, bits=bits)
    values = compress_tile64(dense, "value", sparsity=0.5, bits=bits)
    q = torch.from_numpy(random_matrices(3 * group, rows, head_dim, seed=1)).to(dtype)
    p = torch.from_numpy(random_matrices(3 * group, rows, 150, seed=2)).to(dtype)
    # The judge is what unpacking to the type of the queries gives: docs/numerics.md section 8.
    k, v = (
        unpack_tile64(t, dtype=str(dtype).removeprefix("torch.")).double().repeat_interleave(group, 0)
        for t in (keys, values)
    )
    out = torch.full((3 * group, rows, 150), float("nan"), dtype=dtype)
    assert multiply_keys(keys, q, out) is out
    assert ops.last_implementation() == implementation
    assert relative_error(out, q.double() @ k.transpose(1, 2)) <= limit
    assert relative_error(multiply_values(values, p), p.double() @ v) <= limit


def attend_dense(q, k, v, *, scale=None, softcap=None, causal=False):
    """Attention in float64: q [batch, q_heads, rows, head_dim], k and v [batch, kv_heads, tokens, head_dim]."""
    group, rows, tokens = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if causal:
        hidden = torch.arange(tokens)[None] > torch.arange(rows)[:, None] + tokens - rows
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "recent_tokens", "rows", "options"),
    [
        (150, 0, 1, {}),
        (150, 33, 1, {"scale": 0.3}),
        (64, 40, 5, {"causal": True}),
        (0, 9, 2, {"softcap": 5.0}),
        (200, 17, 16, {"softcap": 2.0, "causal": True}),
    ],
)
def test_attention_is_that_of_the_unpacked_tiles(implementation, dtype, tokens, recent_tokens, rows, options):
    limit = LIMITS[dtype]
    k, v = (torch.from_numpy(random_matrices(2, 3, tokens + recent_tokens, 128, seed=s)).to(dtype) for s in (1, 2))
    keys = compress_tile64(k[:, :, :tokens], "key", sparsity=0.7, bits=2)
    values = compress_tile64(v[:, :, :tokens], "value", sparsity=0.5, bits=16)
    q = torch.from_numpy(random_matrices(2, 6, rows, 128)).to(dtype)
    recent = (k[:, :, tokens:], v[:, :, tokens:])
    k, v = (
        torch.cat([unpack_tile64(tiles, dtype=str(dtype).removeprefix("torch.")), part], 2)
        for tiles, part in zip((keys, values), recent, strict=True)
    )
    expected, expected_lse = attend_dense(q, k, v, **options)
    out, lse = attend_tile64(q, keys, values, recent=recent if recent_tokens else None, return_lse=True, **options)
    assert ops.last_implementation() == implementation
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert relative_error(out, expected) <= limit
    torch.testing.assert_close(lse.double(), expected_lse, rtol=limit, atol=limit)
    again = attend_tile64(q, keys, values, recent=recent if recent_tokens else None, **options)
    assert torch.equal(again, out)


def test_no_tokens_at_all_give_zero_and_minus_infinity():
    empty = [compress_tile64(torch.zeros(2, 0, 64), kind, sparsity=0.5) for kind in KINDS]
    out, lse = attend_tile64(torch.ones(1, 4, 1, 64), *empty, return_lse=True)
    assert not out.any() and bool((lse == -torch.inf).all())


def test_numpy_attends_too_and_strided_queries_are_copied():
    x = random_matrices(2, 3, 70, 64)
    keys, values = (compress_tile64(x, kind, sparsity=0.5) for kind in KINDS)
    q = random_matrices(2, 5, 6, 64).swapaxes(1, 2)
    from_numpy = attend_tile64(q, keys, values)
    assert isinstance(from_numpy, np.ndarray) and from_numpy.shape == (2, 6, 5, 64)
    from_torch = attend_tile64(torch.from_numpy(q), keys, values)
    np.testing.assert_array_equal(from_numpy, from_torch.numpy())


def test_every_public_function_is_at_the_top():
    for name in ("Tile64", "compress_tile64", "unpack_tile64", "attend_tile64", "multiply_keys", "multiply_values"):
        assert getattr(kvpack, name).__name__ == name
