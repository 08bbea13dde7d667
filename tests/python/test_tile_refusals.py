"""What tiles refuse, from Python: wrong numbers, shapes, types and pairs, hostile bytes; both values are shown."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_parameters import tile_parameters

from kvpack import (
    Tile64,
    attend_tile64,
    compress_tile64,
    concat_tile64,
    multiply_keys,
    multiply_values,
    torch_ops,
    unpack_tile64,
)
from kvpack.tile64 import TENSOR_NAMES
from kvpack.tile_batches import select_batches

X = torch.zeros(2, 70, 64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compress_tile64(X[0], "key", sparsity=0.5), ValueError, r"\(70, 64\)"),
        (lambda: compress_tile64(X, "query", sparsity=0.5), ValueError, "query.*key, value"),
        (lambda: compress_tile64(X, "key", sparsity=1.0), ValueError, "sparsity is 1.0"),
        (lambda: compress_tile64(X, "key", sparsity=float("nan")), ValueError, "sparsity is nan"),
        (lambda: compress_tile64(X, "key", sparsity=0.5, bits=3), ValueError, "bits is 3.*1, 2, 4, 8, 16"),
        (lambda: compress_tile64(X, "key", sparsity=0.5, bits=2.0), ValueError, "bits is 2.0.*1, 2, 4, 8, 16"),
        (lambda: compress_tile64(X, "key", sparsity=0.5, bits=True), ValueError, "bits is True.*1, 2, 4, 8, 16"),
        (lambda: compress_tile64(X, "key", sparsity=0.5, rule="best"), ValueError, "best.*exact, kth_value"),
        (lambda: compress_tile64(X[..., :32], "key", sparsity=0.5), NotImplementedError, "64, 128, 256, not for 32"),
        (lambda: compress_tile64(X.double(), "key", sparsity=0.5), TypeError, "float64.*float16, bfloat16, float32"),
        (lambda: compress_tile64([1.0], "key", sparsity=0.5), TypeError, "list"),
        (
            lambda: compress_tile64(torch.zeros(2, 70, 128)[..., ::2], "key", sparsity=0.5),
            ValueError,
            "stride.*2|2.*stride",
        ),
        (
            lambda: compress_tile64(X, "key", sparsity=0.5, channel_scores=torch.ones(32)),
            ValueError,
            r"\(32,\).*\(64,\) or \(2, 64\)",
        ),
        (
            lambda: compress_tile64(X, "key", sparsity=0.5, channel_scores=torch.ones(64).double()),
            ValueError,
            "float64.*float32",
        ),
        (lambda: unpack_tile64(tiles_of(), out=torch.zeros(2, 70, 128)), ValueError, "128"),
        (lambda: unpack_tile64(tiles_of(), out=torch.zeros(2, 71, 64)), ValueError, "71"),
        (lambda: unpack_tile64(tiles_of(), dtype="float16", out=X), ValueError, "float16.*float32"),
        (lambda: unpack_tile64(tiles_of(), dtype="int64"), ValueError, "int64"),
        (lambda: unpack_tile64(tiles_of(), dtype="float8"), ValueError, "float8.*float16, bfloat16, float32"),
        (lambda: unpack_tile64(X), TypeError, "kvpack.Tile64, not Tensor"),
        (lambda: multiply_keys(X, torch.zeros(2, 1, 64)), TypeError, "keys must be a kvpack.Tile64, not Tensor"),
        (lambda: multiply_keys(tiles_of(), X[0]), ValueError, r"q has shape \(70, 64\)"),
        (lambda: multiply_keys(tiles_of(), torch.zeros(2, 1, 128)), ValueError, "128"),
        (lambda: multiply_keys(tiles_of(), torch.zeros(3, 1, 64)), ValueError, "3"),
        (lambda: multiply_keys(tiles_of(), torch.zeros(2, 17, 64)), ValueError, "17"),
        (lambda: multiply_keys(tiles_of("value"), torch.zeros(2, 1, 64)), ValueError, "key"),
        (lambda: multiply_values(tiles_of("key"), torch.zeros(2, 1, 70)), ValueError, "value"),
        (lambda: multiply_values(tiles_of("value"), torch.zeros(2, 1, 71)), ValueError, "71"),
        (lambda: multiply_keys(tiles_of(), torch.zeros(2, 1, 64), torch.zeros(2, 1, 64)), ValueError, "64"),
        (lambda: multiply_keys(tiles_of(), torch.zeros(2, 1, 64), torch.zeros(2, 1, 70).half()), ValueError, "float16"),
        (lambda: attend(q=torch.zeros(2, 1, 64)), ValueError, r"q has shape \(2, 1, 64\)"),
        (lambda: attend(q=torch.zeros(1, 3, 1, 64)), ValueError, "3"),
        (lambda: attend(scale=0.0), ValueError, "scale is 0.0"),
        (lambda: attend(scale=float("inf")), ValueError, "scale is inf"),
        (lambda: attend(softcap=-1.0), ValueError, "softcap is -1"),
        (lambda: attend(values=tiles_of("key")), ValueError, "value"),
        (lambda: attend(values=tiles_of("value", 71)), ValueError, "7[01].*7[01]"),
        (lambda: attend(recent=(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 4, 64))), ValueError, "3"),
        (lambda: attend(recent=(torch.zeros(1, 2, 3, 64).half(),) * 2), ValueError, "float16"),
        (lambda: attend(out=torch.zeros(1, 2, 2, 64)), ValueError, "2"),
        (lambda: attend(scale=-1.0), ValueError, "scale is -1.0.*above 0"),
        (lambda: attend(values=X), TypeError, "values must be a kvpack.Tile64, not Tensor"),
        (lambda: attend(recent=(torch.zeros(1, 2, 3, 64),)), TypeError, "recent is a pair"),
        (lambda: attend(recent=(None, torch.zeros(1, 2, 3, 64))), TypeError, "recent is a pair"),
        (lambda: tiles_of(numpy=True).to("cpu"), TypeError, "numpy arrays cannot go to cpu"),
        (lambda: replace(tiles_of(), tokens=-1), ValueError, "tokens is -1"),
        (lambda: replace(tiles_of(), tokens=70.0), ValueError, "tokens is 70.0"),
    ],
)
def test_refusals_show_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


def tiles_of(kind="key", tokens=70, numpy=False) -> Tile64:
    x = torch.zeros(2, tokens, 64)
    return compress_tile64(x.numpy() if numpy else x, kind, sparsity=0.5, bits=2)


def attend(q=None, values=None, **options):
    q = torch.zeros(1, 2, 1, 64) if q is None else q
    return attend_tile64(q, tiles_of(), tiles_of("value") if values is None else values, **options)


@pytest.mark.parametrize("attend_function", [attend_tile64, torch_ops.attend_tile64])
def test_tiles_of_another_batch_than_the_query_are_refused(attend_function):
    x = torch.randn(1, 2, 64, 64)
    keys, values = (compress_tile64(x, kind, sparsity=0.5) for kind in ("key", "value"))
    with pytest.raises(ValueError, match=r"q has shape \(2, 4, 1, 64\); keys are of batch 1, kv_heads 2"):
        attend_function(torch.randn(2, 4, 1, 64), keys, values)


def test_operators_see_kinds_extents_and_pairs_as_the_functions_do():
    q, keys, values = torch.zeros(1, 2, 1, 64), tiles_of(), tiles_of("value")
    wide = compress_tile64(torch.zeros(2, 70, 128), "value", sparsity=0.5, bits=2)
    for call, message in (
        (lambda: torch_ops.attend_tile64(q, values, keys), "kind value; expected key"),
        (lambda: torch_ops.multiply_keys(values, torch.zeros(2, 1, 64)), "kind value; expected key"),
        (lambda: torch_ops.multiply_values(keys, torch.zeros(2, 1, 70)), "kind key; expected value"),
        (lambda: torch_ops.attend_tile64(q, keys, wide), r"\[70, 64\], values \[70, 128\]"),
        (lambda: torch_ops.compress_tile64(X, "query", sparsity=0.5), "query.*key, value"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="recent is a pair"):
        torch_ops.attend_tile64(q, keys, values, recent=(q, q, q))


def test_an_incomplete_block_is_not_joined_to_itself_and_libraries_are_not_mixed():
    tiles = tiles_of()
    with pytest.raises(ValueError, match="part 0 has 70 tokens.*multiple of 64"):
        concat_tile64([tiles, tiles])
    with pytest.raises(TypeError, match="part 1.*numpy.*part 0.*torch"):
        concat_tile64([tiles_of(tokens=64), tiles_of(numpy=True)])
    with pytest.raises(TypeError, match="part 0 must be a kvpack.Tile64, not Tensor"):
        concat_tile64([X])


@pytest.mark.parametrize("bits", [16, 2])
def test_hostile_tiles_are_neither_joined_nor_selected_nor_trimmed_nor_counted(bits):
    good = compress_tile64(torch.randn(2, 64, 64).half(), "key", sparsity=0.5, bits=bits)
    backwards, outside = good.offsets.clone(), good.offsets.clone()
    backwards[1, 0], outside[1, -1] = -1, 10**6
    hostile = [
        replace(good, payload=good.payload[:-8]),
        replace(good, offsets=outside),
        replace(good, bitmaps=good.bitmaps[:, :-1]),
        replace(good, tokens=200),
        replace(good, starts=good.starts - 1) if bits == 16 else replace(good, offsets=backwards),
    ]
    if bits == 16:  # both batches in the same place
        hostile.append(replace(good, starts=torch.zeros_like(good.starts)))
    for tiles in hostile:
        for call in (
            lambda tiles=tiles: tiles.num_bytes,
            tiles.trim,
            tiles.validate,
            lambda tiles=tiles: concat_tile64([good, tiles]),
            lambda tiles=tiles: select_batches(tiles, [1, 0]),
        ):
            with pytest.raises(ValueError, match=r"\d.*\d"):
                call()


@settings(max_examples=60, deadline=None)
@given(tile_parameters, st.data())
def test_hostile_tensors_are_refused_or_decoded_but_never_read_outside(case, data):
    kind, bits, tokens, head_dim, sparsity, seed = case
    tiles = compress_tile64(
        np.random.default_rng(seed).normal(size=(2, tokens, head_dim)).astype(np.float32),
        kind,
        sparsity=sparsity,
        bits=bits,
    )
    changed = {name: part.copy() for name, part in zip(TENSOR_NAMES, tiles.tensors, strict=True)}
    for _ in range(data.draw(st.integers(1, 3))):
        part = changed[data.draw(st.sampled_from(TENSOR_NAMES))].reshape(-1).view(np.uint8)
        if part.size:
            part[data.draw(st.integers(0, part.size - 1))] = data.draw(st.integers(0, 255))
    hostile = Tile64(kind, bits, tokens, head_dim, "float32", (2,), **changed)
    p = np.ones((2, 1, head_dim if kind == "key" else tokens), np.float32)
    multiply = multiply_keys if kind == "key" else multiply_values
    for call in (hostile.validate, lambda: unpack_tile64(hostile), lambda: multiply(hostile, p)):
        try:
            call()
        except ValueError as error:
            assert str(error)
