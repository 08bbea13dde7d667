"""Transform-coded rows in Python: the laws, a second decoder, dtypes and strides, tables, refusals."""

import numpy as np
import pytest
import torch
from klt_decoder import decode_row, make_parts, unpack

from kvpack.klt import KltTable, KltTables, check_klt, compress_klt, simulate_klt, unpack_klt
from kvpack.ops import list_implementations

LEVELS = [64, 32, 20, 20, 16, 12, 12, 10, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 3, 2, 2, 1, 1]
IMPLEMENTATIONS = [
    row["name"] for row in list_implementations() if row["operation"] == "compress_klt" and row["device"] == "cpu"
]


def make_tables(blocks=((32, LEVELS), (16, [4] * 11 + [3] * 5)), seed=3) -> KltTables:
    return KltTables(
        tuple(KltTable(**make_parts(channels, levels, seed + i)) for i, (channels, levels) in enumerate(blocks))
    )


def make_x(shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 48), (19, 48), (2, 7, 48), (2, 0, 48)])
@pytest.mark.parametrize("protected", [0, 1, 9])
def test_unpacking_gives_what_simulation_gives(implementation, dtype, shape, protected):
    tables, x = make_tables(), make_x(shape, dtype)
    rows = compress_klt(x, tables, protected_tokens=protected)
    assert rows.shape == tuple(shape) and rows.protected_tokens == min(protected, shape[-2])
    check_klt(rows, tables)
    simulated = simulate_klt(x, tables, protected_tokens=protected)
    assert torch.equal(unpack_klt(rows, tables), simulated)
    assert torch.equal(simulated[..., :protected, :], x[..., :protected, :])
    assert simulate_klt(x, tables, protected_tokens=protected, out=x) is x and torch.equal(x, simulated)


def test_a_second_decoder_reads_the_same(implementation):
    tables, x = make_tables(), make_x((13, 48)).numpy()
    rows = compress_klt(x, tables)
    expected = unpack_klt(rows, tables)
    for (table, channels), block in zip(tables.slices(), rows.blocks, strict=True):
        levels = table.levels[table.levels > 1].tolist()
        for t in range(13):
            mine = unpack(block[t].tobytes(), levels, table.mean, table.synthesis, table.centroids)
            np.testing.assert_array_equal(mine, expected[t, channels])


def test_codes_are_those_of_the_rule(implementation):
    """A second encoder: float64 products, so a coefficient within 1e-5 of a boundary may fall on either side."""
    tables, x = make_tables(((32, LEVELS),)), make_x((50, 32)).numpy()
    table, rows = tables.blocks[0], compress_klt(x, tables).blocks[0]
    z = (x.astype(np.float64) - table.mean) @ table.analysis
    scales = np.sqrt((z[:, table.in_scale == 1] ** 2).mean(1))
    for t in range(50):
        scale, codes = decode_row(rows[t].tobytes(), table.levels[table.levels > 1].tolist())
        assert abs(scale - scales[t]) <= scales[t] * (2**-4 + 2**-11)
        first = 0
        for k, code in enumerate(codes):
            centroids = table.centroids[first : first + table.levels[k]].astype(np.float64)
            distances = np.abs(z[t, k] / scale - centroids)
            assert distances[code] <= distances.min() + 1e-5
            first += table.levels[k]


def test_bytes_are_what_is_counted():
    tables, x = make_tables(), make_x((100, 48), torch.float16)
    rows = compress_klt(x, tables, protected_tokens=1)
    expected = 48 * 2 + 99 * (tables.blocks[0].row_bytes + tables.blocks[1].row_bytes)
    assert rows.nbytes == expected and rows.bits_per_element == 8 * expected / 4800
    # 25 coefficients: fields 4 + 2*6 + 1*6 + 6 + 5 + 3*2, trits 7 (12 bits), quints 5 (12 bits), septs 2 (6 bits)
    assert tables.blocks[0].row_bytes == -(-(8 + 4 + 12 + 6 + 6 + 5 + 6 + 12 + 12 + 6) // 16) * 2


def test_strided_and_sliced_tensors_are_read_where_they_lie(implementation):
    tables = make_tables()
    wide = make_x((40, 3, 60))
    x = wide[::2, 1, 6:54]
    dense = x.contiguous()
    assert torch.equal(simulate_klt(x, tables), simulate_klt(dense, tables))
    turned = make_x((48, 20)).T
    assert torch.equal(simulate_klt(turned, tables), simulate_klt(turned.contiguous(), tables))
    for a, b in zip(compress_klt(x, tables).blocks, compress_klt(dense, tables).blocks, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("protected", [0, 2])
@pytest.mark.parametrize("width", [16, 8])
def test_keys_are_rotated_as_models_do(implementation, width, protected):
    tables, x = make_tables(((32, LEVELS), (32, LEVELS)), seed=5), make_x((2, 9, 64))
    angles = make_x((9, width // 2), seed=2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    rows = compress_klt(x, tables, protected_tokens=protected)
    plain = unpack_klt(rows, tables).reshape(2, 9, 4, 16)
    turned, rest = plain[..., :width], plain[..., width:]
    halves = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), -1)
    expected = torch.cat((turned * cos[:, None] + halves * sin[:, None], rest), -1).reshape(2, 9, 64)
    assert torch.equal(unpack_klt(rows, tables, rope=(cos, sin), head_dim=16), expected)


def test_make_orders_folds_and_drops():
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(6, 6)))[0]
    deviations = np.array([4.0, 1.0, 0.5, 2.0, 1.0, 3.0])
    levels, in_scale = [2, 1, 1, 8, 3, 1], [1, 0, 1, 1, 0, 0]
    codebooks = [np.sort(random.normal(size=n)) for n in levels]
    table = KltTable.make(np.zeros(6), basis, basis.T, deviations, levels, codebooks, in_scale)
    assert table.levels.tolist() == [8, 3, 2, 1] and table.in_scale.tolist() == [1, 0, 1, 1]
    assert (table.coefficients, table.coded, table.channels) == (4, 3, 6)
    np.testing.assert_allclose(table.analysis[:, 0], basis[:, 3] / 2.0, rtol=1e-6)
    np.testing.assert_allclose(table.synthesis[2], basis[:, 0] * 4.0, rtol=1e-6)
    np.testing.assert_allclose(table.centroids[8:11], codebooks[4], rtol=1e-6)
    with pytest.raises(ValueError, match=r"deviations\[3\] is 0.0"):
        KltTable.make(np.zeros(6), basis, basis.T, deviations * [1, 1, 1, 0, 1, 1], levels, codebooks, in_scale)
    with pytest.raises(ValueError, match="codebook 0 has 3 centroids; its coefficient has 2 levels"):
        KltTable.make(np.zeros(6), basis, basis.T, deviations, levels, [[1, 2, 3], *codebooks[1:]], in_scale)
    nothing = KltTable.make(np.ones(6), basis, basis.T, deviations, [1] * 6, codebooks, in_scale)
    assert nothing.row_bytes == 0
    assert torch.equal(simulate_klt(make_x((3, 6)), KltTables((nothing,))), torch.ones(3, 6))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"levels": [9, 3]}, "levels.0. is 9"),
        ({"levels": [3, 4]}, "levels.1. is 4 after 3"),
        ({"levels": [300, 4]}, "levels holds 300"),
        ({"levels": [0, 0]}, "levels holds 0"),
        ({"levels": [2.0, 2.0]}, "float64"),
        ({"mean": np.zeros((2, 4), np.float32)}, "mean has shape"),
        ({"mean": np.zeros(4)}, "table.mean is float64"),
        ({"analysis": np.full((4, 2), np.nan, np.float32)}, r"table.analysis\[0, 0\] is nan"),
        ({"synthesis": np.zeros((3, 4), np.float32)}, r"table.synthesis has shape \[3, 4\]; expected \[2, 4\]"),
        ({"centroids": np.zeros(5, np.float32)}, "centroid 1 of coefficient 0 is 0 after 0"),
        ({"centroids": np.zeros(6, np.float32)}, r"table.centroids has shape \[6\]; expected \[5\]"),
        ({"in_scale": np.zeros(2, np.int32)}, "in_scale is 0 for all 2"),
        ({"row_alignment": 3}, "row_alignment is 3"),
    ],
)
def test_wrong_tables_are_refused(change, words):
    good = make_parts(4, [3, 2])
    with pytest.raises(ValueError, match=words):
        KltTable(**{**good, **change})


def test_wrong_use_is_refused():
    tables, x = make_tables(), make_x((5, 48))
    with pytest.raises(ValueError, match=r"x has shape \(5, 47\).*have 48 channels"):
        simulate_klt(x[:, 1:], tables)
    with pytest.raises(ValueError, match=r"x has shape \(48,\)"):
        compress_klt(x[0], tables)
    with pytest.raises(ValueError, match="protected_tokens is -1"):
        compress_klt(x, tables, protected_tokens=-1)
    x[3, 40] = float("nan")
    with pytest.raises(ValueError, match="block 1: x holds nan at sequence 0, token 3, channel 8"):
        compress_klt(x, tables)
    with pytest.raises(ValueError, match="block 1: x holds nan at sequence 0, token 1, channel 8.*count from 2 on"):
        compress_klt(x, tables, protected_tokens=2)
    rows = compress_klt(x[:3], tables)
    other = make_tables(seed=4)
    with pytest.raises(ValueError, match=f"tables {tables.fingerprint}, not with {other.fingerprint}"):
        unpack_klt(rows, other)
    with pytest.raises(ValueError, match="both or neither"):
        unpack_klt(rows, tables, head_dim=16)
    with pytest.raises(ValueError, match=r"out has shape \(2, 48\)"):
        unpack_klt(rows, tables, out=torch.empty(2, 48))
    with pytest.raises(ValueError, match="0 blocks"):
        KltTables(())
