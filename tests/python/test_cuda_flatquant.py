"""FlatQuant on CUDA: each way of multiplying, any alignment and number of tokens, graphs, streams, races."""

import contextlib

import pytest
import torch
from cuda_tensors import GPU, HAS_CUDA, assert_same_bits
from flatquant_cases import (
    DTYPES,
    SHARE_OFF,
    SIDES,
    assert_close,
    codes_of,
    exact_transform,
    make_case,
)

import kvpack
from kvpack import Int4Rows, kron_quantize, ops

pytestmark = GPU

IMPLEMENTATIONS = ["cuda_plain", "cuda_mma", "cuda"]
LARGER = {
    "both sides 256": (256, 256),
    "left of 256 rows": (256, 128),
    "above 256": (300, 40),
    "padding in both": (50, 200),
    "one row of left": (1, 64),
}
EDGES = [
    (1, 32),
    (17, 32),
    (32, 32),
    (33, 64),
    (64, 64),
    (20, 80),
    (3, 128),
    (65, 128),
    (96, 128),
    (97, 128),
    (113, 128),
]
EDGES += [(128, 128), (65, 224)]
"""Around the steps of 16 and the halves of 64 rows of each N that Hopper has a kernel for."""


@contextlib.contextmanager
def forced(name):
    ops.force_implementation(name)
    try:
        yield
    finally:
        ops.force_implementation("")


def larger_case(name, tokens, dtype):
    return case_of(*LARGER[name], tokens, dtype)


def case_of(rows, columns, tokens, dtype):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    tensors = (
        torch.randn(tokens, rows * columns, generator=generator),
        torch.randn(rows, rows, generator=generator) / rows**0.5,
        torch.randn(columns, columns, generator=generator) / columns**0.5,
    )
    return [part.to(dtype).cuda() for part in tensors]


def parts(rows):
    return [rows.codes, rows.scales] + ([] if rows.zeros is None else [rows.zeros])


def assert_same_rows(expected, actual, what=""):
    for name, one, other in zip(("codes", "scales", "zeros"), parts(expected), parts(actual), strict=False):
        if one.dtype in (torch.int8, torch.uint8):
            assert torch.equal(one, other), f"{what}: {name} differ"
        else:
            assert_same_bits(one, other, f"{what}: {name}")


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_way_of_multiplying_agrees_with_float64(way, dtype):
    budget = [0, 0]
    cases = [(name, make_case(name, 5, dtype, "cuda")) for name in SIDES]
    cases += [(name, larger_case(name, 3, dtype)) for name in LARGER]
    with forced(way):
        for _, (x, left, right) in cases:
            y = exact_transform(x, left, right)
            for output in ("int8", "packed"):
                if output == "packed" and x.shape[1] % 8:
                    continue
                rows = kron_quantize(x, left, right, output=output)
                assert ops.last_implementation() == way
                assert_close(rows, y, dtype, budget=budget)
    assert budget[0] <= SHARE_OFF[dtype] * budget[1], f"{budget[0]} of {budget[1]} codes are off by one"


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_each_way_of_multiplying_has_producers_clips_and_grids(way, dtype):
    for name in ("896", "5120", "14336", "28672", "odd sides", "right alone"):
        x, left, right = make_case(name, 6, dtype, "cuda")
        up = make_case(name, 6, dtype, "cuda")[0].flip(0).contiguous()
        weight = (torch.rand(x.shape[1], device="cuda") + 0.5).to(dtype)
        diagonal = (torch.rand(x.shape[1], device="cuda") + 0.5).to(dtype)
        wide = x.double()
        normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() * diagonal.double()
        gated = torch.nn.functional.silu(wide) * up.double()
        settings = dict(clip=(0.9, 0.7), grid="affine", output="int8")
        bounds = dict(high=0.9, low=0.7)
        with forced(way):
            rows = kvpack.rmsnorm_kron_quantize(x, weight, left, right, epsilon=1e-5, diagonal=diagonal, **settings)
            assert_close(rows, exact_transform(normed.to(dtype), left, right), dtype, **bounds)
            rows = kvpack.silu_mul_kron_quantize(x, up, left, right, **settings)
            assert_close(rows, exact_transform(gated.to(dtype), left, right), dtype, **bounds)


@pytest.mark.parametrize("sides", ["4096", "5120", "8192", "14336", "896"])
def test_a_row_does_not_depend_on_the_rows_around_it(sides):
    # Thread blocks take several tokens at a time and several one after another: counts around all of these.
    x, left, right = make_case(sides, 1700, torch.bfloat16, "cuda")
    expected = kron_quantize(x, left, right)
    for tokens in (1, 2, 3, 131, 132, 133, 264, 265, 395, 396, 397, 527, 529, 1057, 1585, 1699):
        rows = kron_quantize(x[:tokens], left, right)
        assert_same_rows(Int4Rows(expected.codes[:tokens], expected.scales[:tokens]), rows, f"{tokens} tokens")
    rows = kron_quantize(x.flip(0), left, right)
    assert_same_rows(Int4Rows(expected.codes.flip(0), expected.scales.flip(0)), rows, "in reverse")


@pytest.mark.parametrize("sides", ["4096", "8192", "14336", "896"])
@pytest.mark.parametrize("way", ["cuda_mma", "cuda"])
def test_many_runs_give_the_same_bits(sides, way):
    x, left, right = make_case(sides, 3000, torch.bfloat16, "cuda")
    with forced(way):
        expected = kron_quantize(x, left, right)
        for run in range(30):
            assert_same_rows(expected, kron_quantize(x, left, right), f"run {run}")
    assert_close(
        Int4Rows(expected.codes[::37], expected.scales[::37]), exact_transform(x[::37], left, right), torch.bfloat16
    )


@pytest.mark.parametrize("sides", EDGES, ids=lambda sides: f"{sides[0]}x{sides[1]}")
def test_sides_at_the_edges_of_a_kernel(sides):
    for dtype in (torch.float16, torch.bfloat16):
        x, left, right = case_of(*sides, 277, dtype)
        y = exact_transform(x, left, right)
        expected = kron_quantize(x, left, right)
        assert_close(expected, y, dtype)
        for tokens in (1, 2, 3):
            first = Int4Rows(expected.codes[:tokens], expected.scales[:tokens])
            assert_same_rows(first, kron_quantize(x[:tokens], left, right), f"{tokens} tokens")
        wide = torch.full((277, x.shape[1] + 64), float("nan"), dtype=dtype, device="cuda")
        wide[:, : x.shape[1]] = x
        assert_same_rows(expected, kron_quantize(wide[:, : x.shape[1]], left, right), "strided")
        assert torch.equal(codes_of(kron_quantize(x, left, right, output="int8")), codes_of(expected))
        assert torch.equal(codes_of(kron_quantize(x, left, right, encoding="offset")), codes_of(expected))
        assert_close(kron_quantize(x, left, right, clip_ratio=0.6), y, dtype, high=0.6, low=0.6)
        assert_close(kron_quantize(x, None, right), exact_transform(x, None, right), dtype)


@pytest.mark.parametrize("producer", ["none", "norm", "gate"])
def test_bits_do_not_depend_on_alignment_or_stride(producer):
    x, left, right = make_case("5120", 37, torch.float16, "cuda")
    weight = torch.rand(5120, device="cuda").half() + 0.5

    def run(x, **more):
        if producer == "norm":
            return kvpack.rmsnorm_kron_quantize(x, weight, left, right, **more)
        if producer == "gate":
            return kvpack.silu_mul_kron_quantize(x, x, left, right, **more)
        return kron_quantize(x, left, right, **more)

    for output in ("packed", "int8", "pairs"):
        expected = run(x, output=output)
        for first, padding in ((1, 0), (0, 3), (0, 8), (8, 8), (3, 5)):
            wide = torch.full((37, 5120 + first + padding), float("nan"), dtype=torch.float16, device="cuda")
            view = wide[:, first : first + 5120]
            view.copy_(x)
            assert_same_rows(expected, run(view, output=output), f"{output} from {first} with {padding}")
        elements = expected.codes.numel()
        for shift in (1, 2, 3, 5):
            memory = torch.full((elements + 16,), 77, dtype=expected.codes.dtype, device="cuda")
            scales = torch.full((37 + 2,), 5.0, device="cuda")
            target = memory[shift : shift + elements].view_as(expected.codes)
            out = Int4Rows(target, scales[1:38].view(37, 1))
            assert_same_rows(expected, run(x, output=output, out=out), f"{output} into {shift}")
            assert (memory[:shift] == 77).all() and (memory[shift + elements :] == 77).all()
            assert scales[0] == 5 and scales[38] == 5


@pytest.mark.parametrize("sides", ["4096", "14336", "896"])  # two tokens share products at 896
def test_every_kind_of_row_in_a_crowd_is_what_it_is_alone(sides):
    x, left, right = make_case(sides, 999, torch.bfloat16, "cuda")
    x[5], x[100] = 0, -0.0
    x[6, 17], x[200, -1], x[998, 0] = float("nan"), float("inf"), -float("inf")
    x[7] *= 1e30
    x[8] *= 1e-38
    together = kron_quantize(x, left, right, grid="affine", encoding="offset")
    for row in (4, 5, 6, 7, 8, 9, 99, 100, 101, 199, 200, 201, 997, 998):
        alone = kron_quantize(x[row : row + 1], left, right, grid="affine", encoding="offset")
        for one, other in zip(parts(together), parts(alone), strict=True):
            assert_same_bits(one[row : row + 1].clone(), other, f"row {row}")
    assert together.scales[[6, 200, 998]].isnan().all() and together.scales.isnan().sum() == 3
    assert (together.scales[[5, 100]] == 1).all()
    assert (codes_of(together)[[6, 200, 998]] == 0).all()


@pytest.mark.skipif(
    not HAS_CUDA or torch.cuda.get_device_capability()[0] != 9, reason="the kernels of Hopper run on Hopper alone"
)
@pytest.mark.parametrize("sides", ["896", "4096", "5120", "8192", "11008", "13824", "14336", "28672"])
def test_hopper_runs_its_own_kernels(sides):
    x, left, right = make_case(sides, 2, torch.bfloat16, "cuda")
    assert "kron_stream_kernel" in kernel_of(lambda: kron_quantize(x, left, right))
    if sides != "896":  # with mma.sync there
        assert "Wgmma" in kernel_of(lambda: kvpack.silu_mul_kron_quantize(x, x, left, right))


def kernel_of(function):
    """The name of the one kernel of kron_quantize that `function` starts."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if "kron" in event.key]
    assert len(names) == 1, [event.key for event in profile.key_averages()]
    return names[0]


@pytest.mark.parametrize("tokens", [1, 128, 700])
def test_a_cuda_graph_replays_each_function(tokens):
    x, left, right = make_case("8192", tokens, torch.bfloat16, "cuda")
    weight = torch.rand(8192, device="cuda").bfloat16()
    static = x.clone()

    def all_functions():
        plain, clipped = kron_quantize(static, left, right, clip_ratio=[1.0, 0.8])
        normed = kvpack.rmsnorm_kron_quantize(static, weight, left, right)
        gated = kvpack.silu_mul_kron_quantize(static, static, left, right, output="int8")
        return [*parts(plain), *parts(clipped), *parts(normed), *parts(gated)]

    all_functions()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_functions()
    for factor in (1.0, -2.0, 0.5):
        static.copy_(x * factor)
        graph.replay()
        replayed = [part.clone() for part in captured]
        for part, expected in zip(replayed, all_functions(), strict=True):
            assert torch.equal(part, expected)


def test_work_waits_for_what_its_stream_did_before():
    x, left, right = make_case("4096", 64, torch.bfloat16, "cuda")
    expected = kron_quantize(x, left, right)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 0.05 s: a call that did not wait would see zeros
        late.copy_(x)
        rows = kron_quantize(late, left, right)
    stream.synchronize()
    assert_same_rows(expected, rows)


@pytest.mark.parametrize("way", ["cuda_plain", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_linear_layer_has_the_bits_of_the_cpu(way, dtype):
    for tokens, features, n in ((1, 130, 64), (129, 257, 4096), (300, 40, 200), (5, 6, 34)):
        generator = torch.Generator().manual_seed(n)
        x = torch.randn(tokens, n, generator=generator)
        x[0, 0] = float("nan")
        weight = torch.randn(features, n, generator=generator)
        bias = torch.randn(features, generator=generator).to(dtype)
        forms = ("pairs", "int8") if n % 8 else ("packed", "int8", "pairs")
        for form in forms:
            rows = kron_quantize(x, grid="affine", output=form)
            packed = kron_quantize(weight, output=forms[0], encoding="offset")
            expected = kvpack.linear_w4a4(rows, packed, bias)
            with forced(way):
                actual = kvpack.linear_w4a4(to_cuda(rows), to_cuda(packed), bias.cuda())
                assert ops.last_implementation() == way
            finite = ~expected.isnan()
            assert torch.equal(actual.cpu().isnan(), ~finite)
            assert_same_bits(expected[finite], actual.cpu()[finite], f"{tokens} x {features} x {n}, {form}")


def to_cuda(rows):
    return Int4Rows(*(None if part is None else part.cuda() for part in rows[:3]), rows.encoding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantising_has_the_bits_of_the_cpu(dtype):
    for n, grid, output in (
        (896, "affine", "packed"),
        (896, "symmetric", "int8"),
        (34, "affine", "pairs"),
        (7, "symmetric", "int8"),
    ):
        rows = kron_quantize(torch.randn(1001, n), grid=grid, output=output)
        expected = kvpack.dequantize_int4(rows, dtype=dtype)
        assert_same_bits(expected, kvpack.dequantize_int4(to_cuda(rows), dtype=dtype), f"{n} {grid} {output}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_way_back_agrees_with_float64_in_every_shape(dtype):
    for name in SIDES:
        x, left, right = make_case(name, 4, dtype, "cuda")
        exact = exact_transform(x, left, right)
        out = kvpack.undo_transform(x, left, right).cpu().double()
        limit = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 1e-5}[dtype]
        assert (out - exact).norm() <= limit * exact.norm(), name
