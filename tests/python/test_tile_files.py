"""Files of tiles: what is saved comes back to the bit, and whatever is wrong with a file is said with its path."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from kvpack import Tile64, compress_tile64, unpack_tile64
from kvpack.tile64 import TENSOR_NAMES


def make_tiles(kind="key", bits=2, dtype=torch.float16, shape=(2, 3, 70, 64)) -> Tile64:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    return compress_tile64(x, kind, sparsity=0.7, bits=bits)


def read(path) -> tuple[dict, dict]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def parts(tmp_path):
    """Header and tensors of a good file, for tests to break."""
    make_tiles().save(tmp_path / "good.safetensors")
    return read(tmp_path / "good.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("kind", "shape"), [("key", (2, 3, 70, 64)), ("value", (3, 64, 128)), ("value", (1, 0, 64))])
def test_what_is_saved_comes_back_to_the_bit(tmp_path, dtype, bits, kind, shape):
    tiles = make_tiles(kind, bits, dtype, shape)
    tiles.save(tmp_path / "tiles.safetensors")
    loaded = Tile64.load(tmp_path / "tiles.safetensors")
    assert (loaded.kind, loaded.bits, loaded.shape, loaded.dtype) == (kind, bits, shape, tiles.dtype)
    for name, a, b in zip(TENSOR_NAMES, tiles.tensors, loaded.tensors, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert torch.equal(unpack_tile64(loaded), unpack_tile64(tiles))


def test_numpy_tiles_are_saved_and_nothing_but_the_payload_in_use(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 70, 64)).astype(np.float32)
    tiles = compress_tile64(x, "value", sparsity=0.7)
    tiles.save(tmp_path / "tiles.safetensors")
    loaded = Tile64.load(tmp_path / "tiles.safetensors")
    assert loaded.payload.shape == (tiles.payload_elements,)
    np.testing.assert_array_equal(unpack_tile64(loaded).numpy(), unpack_tile64(tiles))


def test_the_header_says_format_and_version(parts):
    header, _ = parts
    assert header == {
        "format": "kvpack-tile64",
        "version": "1",
        "kind": "key",
        "bits": "2",
        "tokens": "70",
        "head_dim": "64",
        "dtype": "float16",
        "leading": "2,3",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "format is 'other'"),
        ({"format": None}, "format is None"),
        ({"version": "2"}, "version is '2'.*reads version '1'"),
        ({"colour": "red"}, "colour"),
        ({"bits": None}, "header has the fields"),
        ({"bits": "3"}, "bits"),
        ({"bits": "two"}, "bits is 'two'"),
        ({"bits": "16"}, "int32|I32|I64|payload|offsets"),
        ({"kind": "query"}, "query"),
        ({"kind": "value", "tokens": "71"}, "bitmaps|offsets|head_dim|tile"),
        ({"tokens": "129"}, r"bitmaps is \[6, 128\] I64; expected \[6, 192\] I64"),
        ({"tokens": "-1"}, "tokens is '-1'"),
        ({"tokens": "99999999999999"}, "tokens is '99999999999999'"),
        ({"tokens": "9999999999999"}, "tokens is '9999999999999'"),
        ({"head_dim": "128"}, "bitmaps"),
        ({"head_dim": "32"}, "32"),
        ({"dtype": "int64"}, "int64"),
        ({"leading": "6,6,6"}, "leading shape"),
        ({"leading": ""}, "leading is ''"),
        ({"leading": "5"}, r"bitmaps is \[6, 128\]"),
    ],
)
def test_wrong_headers_are_refused(tmp_path, parts, change, words):
    header, tensors = parts
    header = {name: text for name, text in {**header, **change}.items() if text is not None}
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, metadata=header)
    if change == {"kind": "value", "tokens": "71"}:
        # The same number of tiles: only the meaning of the bytes differs, and these happen to make sense.
        assert Tile64.load(path).kind == "value"
        return
    with pytest.raises(ValueError, match=f"bad.safetensors is no file of tiles: .*({words})"):
        Tile64.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("zeros"), "tensors are"),
        (lambda t: t.update(more=torch.zeros(1)), "more"),
        (lambda t: t.update(offsets=t["offsets"].long()), r"offsets is \[6, 128\] I64; expected \[6, 128\] I32"),
        (lambda t: t.update(scales=t["scales"][:, :-1].clone()), r"scales is \[6, 127\]"),
        (lambda t: t.update(payload=t["payload"][:-1].clone()), "payload|past"),
        (lambda t: t.update(payload=t["payload"][None]), r"payload is \[1, "),
        (lambda t: t["scales"].fill_(float("nan")), "nan"),
        (lambda t: t["offsets"].neg_(), "offset"),
        (lambda t: t["offsets"][2].add_(1000000), "offset|past|payload"),
        (lambda t: t["bitmaps"][1].fill_(-1), "bitmap|survivors|offset|count"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, parts, change, words):
    header, tensors = parts
    change(tensors)
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=f"bad.safetensors is no file of tiles: .*({words})"):
        Tile64.load(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_are_refused_or_make_tiles_that_unpack(tmp_path, data):
    path = tmp_path / "hostile.safetensors"
    make_tiles(bits=data.draw(st.sampled_from([2, 16])), shape=(2, 70, 64)).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), len(content) - 1, len(content) // 2, 8, 3, 0]))]
    path.write_bytes(content)
    try:
        tiles = Tile64.load(path)
    except ValueError as error:
        assert "hostile.safetensors" in str(error)
    else:
        assert unpack_tile64(tiles).shape == tiles.shape


def test_a_header_that_promises_too_much_is_refused(tmp_path):
    path = tmp_path / "huge.safetensors"
    header = json.dumps({"bitmaps": {"dtype": "I64", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="huge.safetensors is no file of tiles"):
        Tile64.load(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        Tile64.load(tmp_path / "nothing.safetensors")
