"""Attention on tiles in CUDA graphs, on streams and in compiled functions: the bits of the plain call."""

import pytest
import torch
from cuda_tensors import AGAINST_REFERENCE, assert_same_bits
from tile_cases import (
    Case,
    attend,
    keys_of,
    probabilities_of,
    query_of,
    recent_of,
    values_of,
)

from kvpack import attend_tile64, multiply_keys, multiply_values, torch_ops

pytestmark = AGAINST_REFERENCE


@pytest.mark.parametrize("bits", [16, 2])
def test_a_cuda_graph_replays_attention_on_new_queries(bits):
    case = Case(key_bits=bits, value_bits=bits, tokens=2000, recent=20)
    q, recent = query_of(case), recent_of(case)
    static_q, out = torch.zeros_like(q), torch.empty_like(q)
    attend(case, static_q, out, recent=recent)  # loads the kernels, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(case, static_q, out, recent=recent)
    for sign in (1, -1, 1):
        static_q.copy_(sign * q)
        out.fill_(torch.nan)
        graph.replay()
        assert_same_bits(attend(case, sign * q, recent=recent), out)


def test_a_cuda_graph_replays_both_products():
    case = Case(tokens=1000)
    q, p = query_of(case).flatten(0, 1), probabilities_of(case)
    expected = [multiply_keys(keys_of(case)[0], q), multiply_values(values_of(case)[0], p)]
    outputs = [torch.empty_like(x) for x in expected]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        multiply_keys(keys_of(case)[0], q, out=outputs[0])
        multiply_values(values_of(case)[0], p, out=outputs[1])
    for _ in range(2):
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        for wanted, output in zip(expected, outputs, strict=True):
            assert_same_bits(wanted, output)


def test_attention_runs_inside_a_compiled_function():
    case = Case()
    keys, values, q = keys_of(case)[0], values_of(case)[0], query_of(case)

    @torch.compile(backend="aot_eager")
    def layer(q):
        return torch_ops.attend_tile64(q * 2, keys, values) + 1

    assert_same_bits(attend_tile64(q * 2, keys, values) + 1, layer(q))


def test_attention_waits_for_what_its_stream_did_before():
    case = Case(recent=9)
    q, recent = query_of(case), recent_of(case)
    expected = attend(case, q, recent=recent)
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 0.05 s: a call that did not wait would see zeros
        late.copy_(q)
        out = attend(case, late, recent=recent)
    stream.synchronize()
    assert_same_bits(expected, out)
