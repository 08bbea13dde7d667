"""The operators that torch.compile sees: registered as torch wants them, with the numbers of the eager functions."""

import pytest
import torch

import kvpack
from kvpack import torch_ops
from kvpack.tile64 import TENSOR_NAMES

GENERATOR = torch.Generator().manual_seed(6)
K, V = (torch.randn(2, 3, 130, 64, generator=GENERATOR) for _ in range(2))
Q = torch.randn(2, 6, 1, 64, generator=GENERATOR)
RECENT = tuple(torch.randn(2, 3, 9, 64, generator=GENERATOR) for _ in range(2))


def flat(tiles):
    return list(tiles.tensors), int(tiles.kind == "value"), tiles.bits, tiles.tokens, tiles.head_dim


@pytest.mark.parametrize("bits", [2, 16])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_operators_are_registered_as_torch_wants_them(bits, kind):
    tiles = kvpack.compress_tile64(K, kind, sparsity=0.7, bits=bits)
    x = torch.randn(12, 2, 64 if kind == "key" else 130)
    operators = torch.ops.kvpack
    # Nothing is dropped, so that the payload has no unwritten end, which would differ from run to run.
    torch.library.opcheck(operators.compress_tile64, (K[:, :, :128], int(kind == "value"), 0.0, bits, "exact", None))
    torch.library.opcheck(operators.unpack_tile64, (*flat(tiles), torch.float16))
    torch.library.opcheck(operators.multiply_tile64, (*flat(tiles), x))
    keys, values = (kvpack.compress_tile64(t, side, sparsity=0.7, bits=bits) for t, side in ((K, "key"), (V, "value")))
    for recent in ([], list(RECENT)):
        arguments = (Q, list(keys.tensors), list(values.tensors), recent, bits, bits, 130, None, 5.0, False)
        torch.library.opcheck(operators.attend_tile64, arguments)


@pytest.mark.parametrize("bits", [4, 16])
def test_compiled_decoding_gives_the_bits_of_the_eager_functions(bits):
    def decode(k, v, q, recent):
        keys = torch_ops.compress_tile64(k, "key", sparsity=0.5, bits=bits)
        values = torch_ops.compress_tile64(v, "value", sparsity=0.7, bits=bits)
        out = torch_ops.attend_tile64(q, keys, values, recent=recent, scale=0.2, return_lse=True)
        scores = torch_ops.multiply_keys(keys, q.reshape(12, 1, 64) * 2)
        sums = torch_ops.multiply_values(values, scores)
        return *out, scores, sums, torch_ops.unpack_tile64(keys), torch_ops.unpack_tile64(values, dtype=torch.bfloat16)

    compiled = torch.compile(decode, backend="eager", fullgraph=True)
    results = compiled(K, V, Q, RECENT)
    keys = kvpack.compress_tile64(K, "key", sparsity=0.5, bits=bits)
    values = kvpack.compress_tile64(V, "value", sparsity=0.7, bits=bits)
    scores = kvpack.multiply_keys(keys, Q.reshape(12, 1, 64) * 2)
    expected = (
        *kvpack.attend_tile64(Q, keys, values, recent=RECENT, scale=0.2, return_lse=True),
        scores,
        kvpack.multiply_values(values, scores),
        kvpack.unpack_tile64(keys),
        kvpack.unpack_tile64(values, dtype="bfloat16"),
    )
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype and torch.equal(result, wanted)


def test_tiles_of_the_operator_are_those_of_the_function_with_room_behind():
    made = torch_ops.compress_tile64(K, "value", sparsity=0.7)
    expected = kvpack.compress_tile64(K, "value", sparsity=0.7)
    assert made.payload.shape[0] >= expected.payload.shape[0] == made.payload_elements
    for name, a, b in zip(TENSOR_NAMES, made.trim().tensors, expected.tensors, strict=True):
        assert torch.equal(a, b), name


def test_keys_and_values_of_different_lengths_are_refused():
    keys = kvpack.compress_tile64(K, "key", sparsity=0.7)
    values = kvpack.compress_tile64(V[:, :, :129], "value", sparsity=0.7)
    with pytest.raises(ValueError, match="130.*129"):
        torch_ops.attend_tile64(Q, keys, values)
