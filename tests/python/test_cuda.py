"""The CUDA implementations against the reference: the same bits for pruning and quantising, in any shape and layout."""

import ctypes

import numpy as np
import pytest
import torch
from cuda_tensors import (
    AGAINST_REFERENCE,
    PADDED,
    PLAIN,
    SEED,
    STRIDED,
    Guarded,
    assert_same_bits,
    check_against_reference,
    fill,
    place,
)

from kvpack import _native, ops

pytestmark = AGAINST_REFERENCE

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# --- registry and worked examples: the drawings in the kernels' headers ----------------------------------------------


def test_every_operation_has_a_cuda_implementation_that_would_run():
    rows = ops.list_implementations()
    on_gpu = {row["operation"] for row in rows if row["device"] == "cuda" and row["name"] == "cuda" and row["selected"]}
    assert on_gpu == {row["operation"] for row in rows} - {"accumulate_histogram"}  # samples lie on the host
    assert "runs cuda" in ops.explain("simulate_uniform", "cuda")


def test_the_two_largest_of_ranks_5_9_1_7_survive():
    ranks = torch.tensor([[5, 9, 1, 7]], dtype=torch.int32).cuda()
    out, counts = ops.prune_magnitude(ranks.view(torch.float32), 0.5)
    assert out.view(torch.int32).tolist() == [[0, 9, 0, 7]] and counts == (1, 2)


def test_groups_of_two_with_one_protected_token_are_counted_as_drawn():
    x = fill("normal", 5, 3, torch.float32).cuda()
    options = dict(group=2, protected_tokens=1)
    _, by_channel = ops.simulate_uniform(x, 4, axis="per_channel", mode="causal", **options)
    _, by_token = ops.simulate_uniform(x, 4, axis="per_token", **options)
    assert by_channel == (9, 6, 0) and by_token == (12, 8, 0)


def test_a_fraction_of_0_4_makes_four_of_ten_outliers():
    x = torch.arange(10, dtype=torch.float32)[None].cuda()
    out, counts = ops.simulate_uniform(x, 2, axis="per_token", outlier_fraction=0.4)
    assert counts.outliers == 4
    assert out[0, [0, 1, 8, 9]].tolist() == [0, 1, 8, 9]
    dense = torch.tensor([2, 11 / 3, 11 / 3, 16 / 3, 16 / 3, 7])  # a grid of four values over 2 ... 7
    torch.testing.assert_close(out[0, 2:8].cpu(), dense)


# --- prune_magnitude -------------------------------------------------------------------------------------------------

PRUNE_CASES = {
    "no token": dict(shape=(0, 64), head_dim=64),
    "one element": dict(shape=(1, 1), head_dim=1),
    "one above a warp": dict(shape=(3, 33), head_dim=33, sparsity=0.7),
    "three heads of 64": dict(shape=(65, 192), head_dim=64, sparsity=0.7),
    "head 80, no multiple of a warp": dict(shape=(4, 240), head_dim=80),
    "head 128": dict(shape=(70, 1024), head_dim=128, sparsity=0.7),
    "head 256": dict(shape=(3, 512), head_dim=256, sparsity=0.9),
    "head 1000, most registers": dict(shape=(3, 2000), head_dim=1000),
    "head 2100, a block each": dict(shape=(5, 4200), head_dim=2100),
    "head 2100, ties over rounds": dict(shape=(5, 4200), head_dim=2100, kind="ties"),
    "head 2100, constant": dict(shape=(2, 2100), head_dim=2100, kind="constant", sparsity=0.7),
    "all kept": dict(shape=(5, 128), head_dim=64, sparsity=0.0, kind="zeros"),
    "one kept": dict(shape=(5, 64), head_dim=64, sparsity=0.99),
    "ties": dict(shape=(9, 128), head_dim=64, kind="ties"),
    "nearly all tied": dict(shape=(9, 128), head_dim=64, kind="mostly ties", sparsity=0.7),
    "constant": dict(shape=(9, 128), head_dim=64, kind="constant", sparsity=0.7),
    "zeros of both signs": dict(shape=(9, 128), head_dim=64, kind="zeros"),
    "denormals": dict(shape=(9, 128), head_dim=64, kind="denormal"),
    "protected tokens": dict(shape=(9, 128), head_dim=64, protected_tokens=3),
    "all protected": dict(shape=(2, 64), head_dim=64, protected_tokens=5),
    "padded rows, unaligned": dict(shape=(9, 128), head_dim=64, layout=PADDED),
    "strided channels": dict(shape=(9, 128), head_dim=64, layout=STRIDED, protected_tokens=1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["exact", "kth_value"])
@pytest.mark.parametrize("name", PRUNE_CASES)
def test_pruning_equals_the_reference_bit_for_bit(name, rule, dtype):
    case = {"sparsity": 0.5, "kind": "normal", "layout": PLAIN} | PRUNE_CASES[name]
    x = fill(case.pop("kind"), *case.pop("shape"), dtype)
    check_against_reference(ops.prune_magnitude, x, rule=rule, **case)


@pytest.mark.parametrize("rule", ["exact", "kth_value"])
def test_nan_infinities_and_scores_rank_as_in_the_reference(rule):
    x = fill("normal", 7, 192, torch.float32)
    x[2, 5], x[2, 9], x[3, 60], x[4, 100] = float("nan"), float("-inf"), float("inf"), -float("nan")
    scores = torch.linspace(0, 2, 192)
    check_against_reference(ops.prune_magnitude, x, sparsity=0.98, head_dim=64, rule=rule)
    check_against_reference(ops.prune_magnitude, x, sparsity=0.7, head_dim=64, rule=rule, channel_scores=scores)


# --- simulate_uniform ------------------------------------------------------------------------------------------------

AXES = ["per_channel", "per_token"]
UNIFORM_CASES = {
    "no token": dict(shape=(0, 64)),
    "one element": dict(shape=(1, 1)),
    "one token": dict(shape=(1, 64)),
    "one channel": dict(shape=(65, 1)),
    "one below a group": dict(shape=(63, 64)),
    "a group": dict(shape=(64, 192), bits=2),
    "one above a group, odd channels": dict(shape=(65, 3), bits=3),
    "several tiles": dict(shape=(700, 192), bits=4),
    "a thousand channels": dict(shape=(65, 1024), bits=8),
    "1 % outliers": dict(shape=(301, 192), outlier_fraction=0.01),
    "1 % of few": dict(shape=(3, 5), outlier_fraction=0.01),
    "1 % of a thousand": dict(shape=(64, 1024), outlier_fraction=0.01),
    "10 % outliers": dict(shape=(65, 192), outlier_fraction=0.1),
    "half are outliers": dict(shape=(63, 192), outlier_fraction=0.5),
    "nearly all are outliers": dict(shape=(63, 65), outlier_fraction=0.99),
    "one element with outliers": dict(shape=(1, 1), outlier_fraction=0.1),
    "groups of 32": dict(shape=(100, 80), bits=2, group=32),
    "groups of 32 with outliers": dict(shape=(100, 80), bits=2, group=32, outlier_fraction=0.1),
    "groups of one": dict(shape=(5, 7), bits=2, group=1),
    "group larger than the vector": dict(shape=(20, 24), group=1000),
    "groups larger than a tile": dict(shape=(700, 600), group=300, protected_tokens=1),
    "protected tokens": dict(shape=(90, 70), kind="sink", outlier_fraction=0.01, protected_tokens=4),
    "protected tokens eat a group": dict(shape=(90, 70), group=32, protected_tokens=33),
    "protected tokens eat groups, outliers": dict(shape=(90, 70), group=16, protected_tokens=40, outlier_fraction=0.1),
    "all protected": dict(shape=(9, 70), protected_tokens=9),
    "causal": dict(shape=(200, 70), mode="causal"),
    "causal, group 32, protected": dict(shape=(200, 70), mode="causal", group=32, protected_tokens=5,
                                        outlier_fraction=0.1),
    "causal without a complete group": dict(shape=(63, 70), mode="causal"),
    "causal, protected up to the incomplete group": dict(shape=(70, 5), mode="causal", protected_tokens=66),
    "clamped offset": dict(shape=(65, 70), offset="clamp", kind="positive"),
    "padded rows, unaligned": dict(shape=(70, 72), layout=PADDED, outlier_fraction=0.01),
    "strided channels": dict(shape=(70, 72), layout=STRIDED, outlier_fraction=0.01, protected_tokens=2),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", UNIFORM_CASES)
def test_quantising_equals_the_reference_bit_for_bit(name, axis, dtype):
    case = {"bits": 4, "kind": "normal", "layout": PLAIN} | UNIFORM_CASES[name]
    x = fill(case.pop("kind"), *case.pop("shape"), dtype)
    check_against_reference(ops.simulate_uniform, x, axis=axis, **case)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.1, 0.5])
@pytest.mark.parametrize(
    "kind", ["constant", "ties", "mostly ties", "positive", "drift", "denormal", "zeros", "huge", "sink"]
)
def test_quantising_equals_the_reference_on_every_kind_of_data(kind, outliers, axis):
    x = fill(kind, 83, 72, torch.float32)
    for offset in ("floating", "clamp"):
        for compat in (False, True):
            check_against_reference(
                ops.simulate_uniform, x, bits=3, axis=axis, outlier_fraction=outliers, offset=offset, compat=compat
            )


def test_sixteen_bits_copy_every_bit_even_nan():
    for layout in (PLAIN, STRIDED):
        for dtype in DTYPES:
            x = fill("normal", 65, 33, dtype)
            x[1, 7] = float("nan")
            out = Guarded(x.shape, dtype, layout)
            _, counts = ops.simulate_uniform(place(x, layout).view, 16, axis="per_token", out=out.view)
            assert_same_bits(x, out.view)
            assert counts == (0, 0, 0)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("outliers", [0.0, 0.02])
@pytest.mark.parametrize("axis", AXES)
def test_a_value_that_is_not_finite_is_named_and_x_stays_as_it_was(axis, outliers, in_place):
    x = fill("normal", 2 * 65, 70, torch.float32).view(2, 65, 70)
    x[1, 17, 69], x[1, 20, 3] = float("inf"), float("nan")
    on_gpu = x.cuda()
    out = on_gpu if in_place else torch.empty_like(on_gpu)
    with pytest.raises(ValueError, match="sequence 1, token 17, channel 69"):
        ops.simulate_uniform(on_gpu, 4, axis=axis, outlier_fraction=outliers, out=out)
    assert_same_bits(x, on_gpu)


def test_bad_values_in_exact_tokens_do_not_matter():
    x = fill("normal", 70, 8, torch.float32)
    x[0, 3] = x[69, 2] = float("nan")
    options = dict(bits=4, axis="per_channel", mode="causal", protected_tokens=1)
    check_against_reference(ops.simulate_uniform, x, **options)


def test_a_batch_is_its_sequences():
    x = fill("normal", 3 * 65, 40, torch.float16).view(3, 65, 40)
    for operation, options in (
        (ops.simulate_uniform, dict(bits=2, axis="per_channel", outlier_fraction=0.05, protected_tokens=1)),
        (ops.simulate_uniform, dict(bits=2, axis="per_token", group=8)),
        (ops.prune_magnitude, dict(sparsity=0.5, head_dim=8, protected_tokens=2)),
    ):
        expected, expected_counts = operation(x, **options)
        transposed = x.cuda().transpose(0, 1).contiguous().transpose(0, 1)  # batch stride below the token stride
        actual, counts = operation(transposed, **options, out=torch.empty_like(transposed))
        assert_same_bits(expected, actual)
        assert counts == expected_counts


# --- compare ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_comparing_tensors_agrees_with_float64(dtype):
    for tokens, channels in ((0, 4), (1, 1), (65, 3), (700, 1024)):
        x, y = fill("normal", tokens, channels, dtype), fill("ties", tokens, channels, dtype)
        expected = ops.compare_tensors(x, y)
        actual = ops.compare_tensors(place(x, STRIDED).view, place(y, PADDED).view)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
        assert actual.largest == expected.largest
        assert actual == ops.compare_tensors(place(x, STRIDED).view, place(y, PADDED).view), "differs from run to run"


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 31, 256, 257, 5003, 49152])
def test_comparing_predictions_agrees_with_float64(vocabulary, dtype):
    torch.manual_seed(SEED)
    reference = (torch.randn(19, vocabulary) * 4).to(dtype)
    logits = (reference.float() + torch.randn(19, vocabulary)).to(dtype)
    if vocabulary > 2:
        reference[:, 1] = logits[:, 1] = float("-inf")
    targets = torch.arange(19) * 14 % vocabulary
    targets[targets == 1] = 0
    expected = ops.compare_logits(reference, logits, targets)
    actual = ops.compare_logits(place(reference, PADDED).view, place(logits).view, targets.cuda())
    assert ops.last_implementation() == "cuda"
    for name in ("nll", "kl"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-6, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(actual.top1, expected.top1)
    same = ops.compare_logits(place(logits, PADDED).view, place(logits).view, targets.cuda())
    assert (same.kl == 0).all() and (same.top1 == 1).all()


def test_the_first_of_tied_logits_is_the_top_token():
    reference, logits = torch.zeros(1, 600), torch.zeros(1, 600)
    reference[0, [9, 521]] = 3.0
    logits[0, [521, 522]] = 3.0
    target = torch.zeros(1, dtype=torch.int64)
    assert ops.compare_logits(reference.cuda(), logits.cuda(), target.cuda()).top1[0] == 0
    logits[0, 9] = 3.0
    assert ops.compare_logits(reference.cuda(), logits.cuda(), target.cuda()).top1[0] == 1


def test_a_target_outside_the_vocabulary_is_named():
    logits = torch.zeros(3, 5).cuda()
    for bad in (-1, 5):
        with pytest.raises(ValueError, match=f"target 1 is {bad}; the vocabulary has 5 tokens"):
            ops.compare_logits(logits, logits, torch.tensor([0, bad, 9]).cuda())


# --- streams, devices, errors ----------------------------------------------------------------------------------------


def test_work_runs_on_the_current_stream_behind_what_is_already_there():
    x = fill("normal", 2048, 192, torch.float32)
    expected, _ = ops.simulate_uniform(x, 4, axis="per_channel", outlier_fraction=0.01)
    on_gpu = torch.zeros(x.shape, device="cuda")
    source = x.cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: a call that did not wait would see zeros
        on_gpu.copy_(source)
        out, _ = ops.simulate_uniform(on_gpu, 4, axis="per_channel", outlier_fraction=0.01)
    stream.synchronize()
    assert_same_bits(expected, out)


def test_memory_of_the_host_is_refused_with_an_error_of_ours():
    x = fill("normal", 4, 8, torch.float32)
    view = _native.TENSOR.pack(x.data_ptr(), 2, _native.CUDA, 0, 2, 4, 8, 0, 0, 8, 1, 0, 0)
    error = _native.TensorError()
    with pytest.raises(ValueError, match="is memory of the host that no GPU knows"):
        _native.check(_native.library.kvpack_compare_tensors(view, view, ctypes.byref(error), None))


def test_a_gpu_without_memory_is_an_error_that_names_the_bytes():
    x = torch.zeros(2**23, 1, dtype=torch.float16, device="cuda")
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 10 * 2**20, dtype=torch.uint8, device="cuda")
    # Groups of one: 16 bytes for every element, 128 MiB, more than a pool keeps; smaller tables may be asked for first.
    with pytest.raises(_native.KvpackError, match=r"the GPU has no \d+ bytes of temporary memory"):
        ops.simulate_uniform(x, 4, axis="per_channel", group=1)
    del hog
    torch.cuda.empty_cache()
    ops.simulate_uniform(x, 4, axis="per_channel", group=1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one_does_the_work():
    x = fill("normal", 65, 40, torch.float32)
    expected, _ = ops.simulate_uniform(x, 4, axis="per_token")
    out, _ = ops.simulate_uniform(x.to("cuda:1"), 4, axis="per_token")
    assert torch.cuda.current_device() == 0 and out.device.index == 1
    assert_same_bits(expected, out)
