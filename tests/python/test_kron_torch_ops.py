"""FlatQuant's operators as torch.compile sees them, with the bits of the eager functions; CUDA graphs under -m gpu."""

import pytest
import torch
from cuda_tensors import DEVICES, needs_gpu
from flatquant_cases import make_case

import kvpack
from kvpack import kron_torch_ops

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_operators_are_registered_as_torch_wants_them():
    x, left, right = make_case("896", 4, torch.float32)
    operators = torch.ops.kvpack
    for grid in ("symmetric", "affine"):
        arguments = ([x], "none", 0.0, left, right, None, [1.0, 0.9, 0.5, 0.5], "packed", "offset", grid)
        torch.library.opcheck(operators.kron_quantize, arguments)
    rows = kvpack.kron_quantize(x, left, right, grid="affine")
    tensors = [rows.codes, rows.scales, rows.zeros]
    weight = kvpack.kron_quantize(torch.randn(10, 896))
    torch.library.opcheck(operators.dequantize_int4, (tensors, 0, torch.float16))
    torch.library.opcheck(operators.undo_transform, (x, left, right, None))
    flat_weight = [weight.codes, weight.scales]
    torch.library.opcheck(operators.linear_w4a4, (tensors, 0, flat_weight, 0, None, torch.bfloat16))


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_layer_has_the_bits_of_the_eager_one(device):
    x, left, right = make_case("896", 6, torch.float16, device)
    weight = kvpack.kron_quantize(torch.randn(32, 896, device=device))
    norm = torch.ones(896, dtype=torch.float16, device=device)

    def layer(ops, x):
        rows = ops.kron_quantize(x, left, right, clip_ratio=0.9)
        queries, keys = ops.rmsnorm_kron_quantize(x, norm, left, right, clip_ratio=[1.0, 0.8], grid="affine")
        gated = ops.silu_mul_kron_quantize(x, x / 64, left, right, output="pairs")
        outs = [ops.linear_w4a4(part, weight) for part in (rows, queries, keys, gated)]
        return torch.cat([*outs, ops.undo_transform(ops.dequantize_int4(rows, dtype=torch.float16), left, right)], -1)

    compiled = torch.compile(lambda x: layer(kron_torch_ops, x), fullgraph=True)
    assert torch.equal(compiled(x), layer(kvpack, x))


@needs_gpu
def test_a_cuda_graph_replays_new_inputs():
    x, left, right = make_case("4096", 8, torch.bfloat16, "cuda")
    weight = kvpack.kron_quantize(torch.randn(64, 4096, device="cuda"))
    static = x.clone()

    def layer():
        rows = kvpack.kron_quantize(static, left, right)
        return rows.codes, rows.scales, kvpack.linear_w4a4(rows, weight)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for scale in (1.0, -3.0):
        static.copy_(x * scale)
        graph.replay()
        replayed = [part.clone() for part in captured]
        for part, expected in zip(replayed, layer(), strict=True):
            assert torch.equal(part, expected)
