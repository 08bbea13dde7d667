"""Files of transform-coded rows and tables: they come back to the bit, and what is wrong is said with the path."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_klt import make_tables, make_x

from kvpack.klt import KltRows, compress_klt, unpack_klt
from kvpack.klt_files import load_klt_tables, save_klt_tables


def read(path) -> tuple[dict, dict]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 48), (1, 0, 48)])
def test_rows_come_back_to_the_bit(tmp_path, dtype, shape):
    tables = make_tables()
    rows = compress_klt(make_x(shape, dtype), tables, protected_tokens=2)
    rows.save(tmp_path / "rows.safetensors")
    loaded = KltRows.load(tmp_path / "rows.safetensors", tables)
    assert (loaded.shape, loaded.dtype, loaded.nbytes) == (rows.shape, rows.dtype, rows.nbytes)
    assert torch.equal(unpack_klt(loaded, tables), unpack_klt(rows, tables))


def test_tables_come_back_to_the_bit(tmp_path):
    tables = make_tables()
    save_klt_tables(tables, tmp_path / "tables.safetensors")
    loaded = load_klt_tables(tmp_path / "tables.safetensors")
    assert loaded.fingerprint == tables.fingerprint and loaded.nbytes == tables.nbytes


@pytest.fixture
def saved(tmp_path):
    """Tables, and header and tensors of a file of rows, for tests to break."""
    tables = make_tables()
    compress_klt(make_x((2, 5, 48)), tables, protected_tokens=1).save(tmp_path / "good.safetensors")
    return tables, *read(tmp_path / "good.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "kvpack-tile64"}, "format is 'kvpack-tile64'"),
        ({"version": "1"}, "version is '1'.*reads version '2'"),
        ({"colour": "red"}, "header has the fields"),
        ({"fingerprint": "0" * 32}, "rows were made with tables 0000"),
        ({"dtype": "int64"}, "dtype is 'int64'"),
        ({"dtype": "float16"}, "exact is .* F32; expected .* F16"),
        ({"tokens": "6"}, r"block0 is \[2, 4, \d+\] U8; expected \[2, 5, "),
        ({"tokens": "0"}, "exact has shape"),
        ({"tokens": "many"}, "tokens is 'many'"),
        ({"leading": "3"}, r"exact is \[2, 1, 48\]"),
        ({"leading": "1,2"}, "leading shape"),
        ({"leading": ""}, "exact has shape"),
        ({"blocks": "1"}, "blocks is 1; the tables have 2"),
    ],
)
def test_wrong_headers_are_refused(tmp_path, saved, change, words):
    tables, header, tensors = saved
    save_file(tensors, tmp_path / "bad.safetensors", metadata={**header, **change})
    with pytest.raises(ValueError, match=f"bad.safetensors is no file of transform-coded rows: .*{words}"):
        KltRows.load(tmp_path / "bad.safetensors", tables)


def test_wrong_bytes_are_refused(tmp_path, saved):
    tables, header, tensors = saved
    tensors["block1"][1, 2, -1] = 255
    save_file(tensors, tmp_path / "bad.safetensors", metadata=header)
    with pytest.raises(ValueError, match="bad.safetensors.*block 1: row of sequence 1, token 2: "):
        KltRows.load(tmp_path / "bad.safetensors", tables)


def test_wrong_tables_are_refused(tmp_path):
    path = tmp_path / "tables.safetensors"
    save_klt_tables(make_tables(), path)
    header, tensors = read(path)
    for change, words in [
        ({"block0.mean": tensors["block0.mean"][1:].clone()}, r"block0.mean is \[31\] F32; expected \[32\] F32"),
        ({"block1.levels": tensors["block1.levels"].long()}, "block1.levels is .* I64"),
        ({"block1.levels": tensors["block1.levels"].flip(0)}, "levels"),
        ({"block0.analysis": torch.full_like(tensors["block0.analysis"], torch.nan)}, "table.analysis.* is nan"),
        ({"more": torch.zeros(1)}, "tensors are"),
    ]:
        save_file({**tensors, **change}, tmp_path / "bad.safetensors", metadata=header)
        with pytest.raises(ValueError, match=f"bad.safetensors is no file of transform-coded tables: .*{words}"):
            load_klt_tables(tmp_path / "bad.safetensors")
    for change in ({"blocks": "3"}, {"row_alignments": "2"}, {"row_alignments": "2,3"}, {"blocks": "-1"}):
        save_file(tensors, tmp_path / "bad.safetensors", metadata={**header, **change})
        with pytest.raises(ValueError, match="bad.safetensors"):
            load_klt_tables(tmp_path / "bad.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_are_refused_or_make_rows_that_unpack(tmp_path, data):
    tables, path = make_tables(), tmp_path / "hostile.safetensors"
    compress_klt(make_x((6, 48), torch.float16), tables, protected_tokens=1).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), len(content) - 1, len(content) // 2, 8, 3, 0]))]
    path.write_bytes(content)
    try:
        rows = KltRows.load(path, tables)
    except ValueError as error:
        assert "hostile.safetensors" in str(error)
    else:
        assert unpack_klt(rows, tables).shape == rows.shape


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_of_tables_are_refused_or_make_tables(tmp_path, data):
    path = tmp_path / "hostile.safetensors"
    save_klt_tables(make_tables(((4, [3, 2, 1]),)), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), len(content) - 1, len(content) // 2, 8, 0]))]
    path.write_bytes(content)
    try:
        tables = load_klt_tables(path)
    except ValueError as error:
        assert "hostile.safetensors" in str(error)
    else:
        assert compress_klt(make_x((2, tables.channels)), tables).tokens == 2
