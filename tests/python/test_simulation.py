"""simulate_tensor: what stays exact, what is counted, and that library, type and stride make no difference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kvpack
from kvpack import BitsTally, ops, simulate_tensor

POLICIES = ["fp16", "int8", "int4+1%", "int2+clamp", "kivi-2", "mustafar-50", "k:int3,v:mustafar-70", "int16"]
CAUSAL_POLICIES = ["int4+causal", "int2+1%+causal", "kivi-4+causal"]
policies = st.builds(
    lambda name, sink, window, mode: kvpack.parse_policy(f"{name}{sink}{window}{mode}"),
    st.sampled_from(["int4", "int4+5%", "int2+clamp", "kivi-2", "mustafar-50", "int16"]),
    st.sampled_from(["", "+sink", "+sink3"]),
    st.sampled_from(["", "+window1", "+window7"]),
    st.sampled_from(["", "+causal"]),
)
kinds = st.sampled_from(["key", "value"])
matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 140), st.sampled_from([8, 24])),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def bits_of(x):
    """Bit patterns, so that -0 and 0 differ."""
    x = x.view(torch.int16 if x.element_size() == 2 else torch.int32).numpy() if isinstance(x, torch.Tensor) else x
    return x.view(f"u{x.itemsize}")


@settings(max_examples=60, deadline=None)
@given(matrices, policies, kinds)
def test_numpy_and_torch_give_the_same_bits_and_leave_the_input_alone(x, policy, kind):
    before = x.copy()
    from_numpy = simulate_tensor(x, policy, kind, head_dim=8)
    from_torch = simulate_tensor(torch.from_numpy(x), policy, kind, head_dim=8)
    assert isinstance(from_numpy, np.ndarray) and isinstance(from_torch, torch.Tensor)
    assert from_numpy.shape == x.shape and from_numpy.dtype == x.dtype
    np.testing.assert_array_equal(bits_of(from_numpy), bits_of(from_torch))
    np.testing.assert_array_equal(bits_of(x), bits_of(before))


@settings(max_examples=60, deadline=None)
@given(matrices, policies, kinds)
def test_sink_and_window_tokens_come_back_bit_for_bit(x, policy, kind):
    out = simulate_tensor(x, policy, kind, head_dim=8)
    exact = list(range(min(policy.sink, len(x)))) + list(range(max(0, len(x) - policy.window), len(x)))
    np.testing.assert_array_equal(bits_of(out[exact]), bits_of(x[exact]))
    if len(x) <= policy.sink + policy.window:
        np.testing.assert_array_equal(bits_of(out), bits_of(x))


@settings(max_examples=60, deadline=None)
@given(matrices, policies, kinds)
def test_sink_and_window_tokens_are_in_no_statistic(x, policy, kind):
    changed = x.copy()
    changed[: policy.sink] = 5000
    changed[max(0, len(x) - policy.window) :] = -7000
    inside = slice(policy.sink, max(policy.sink, len(x) - policy.window))
    out = simulate_tensor(x, policy, kind, head_dim=8)
    np.testing.assert_array_equal(
        bits_of(out[inside]), bits_of(simulate_tensor(changed, policy, kind, head_dim=8)[inside])
    )


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(0, 140), st.sampled_from(CAUSAL_POLICIES), st.sampled_from(["", "+sink3"]), kinds)
def test_later_tokens_do_not_change_earlier_complete_causal_groups(x, cut, name, sink, kind):
    policy = kvpack.parse_policy(name + sink)
    group = 32 if "kivi" in name else 64
    cut = min(cut, len(x))
    changed = x.copy()
    changed[cut:] = 3000
    # Groups lie at multiples of their length from the start of the sequence; protected tokens are exact anyway.
    complete = max(min(cut, policy.sink), cut // group * group)
    if kind == "value":
        complete = cut
    first, second = (simulate_tensor(y, policy, kind)[:complete] for y in (x, changed))
    np.testing.assert_array_equal(bits_of(first), bits_of(second))


@settings(max_examples=40, deadline=None)
@given(matrices, policies, kinds)
def test_a_batch_is_its_sequences_one_by_one(x, policy, kind):
    batch = np.stack([x, x[::-1] * 3])
    tallies = BitsTally(), BitsTally()
    together = simulate_tensor(batch, policy, kind, head_dim=8, tally=tallies[0])
    for sequence, out in zip(batch, together, strict=True):
        np.testing.assert_array_equal(
            bits_of(out), bits_of(simulate_tensor(sequence, policy, kind, head_dim=8, tally=tallies[1]))
        )
    assert tallies[0] == tallies[1]


@settings(max_examples=40, deadline=None)
@given(matrices, policies, kinds)
def test_simulating_twice_keeps_shape_and_is_close_to_simulating_once(x, policy, kind):
    once = simulate_tensor(x, policy, kind, head_dim=8)
    twice = simulate_tensor(once, policy, kind, head_dim=8)
    assert twice.shape == once.shape
    if "clamp" not in policy.name and "%" not in policy.name:
        # Minimum and maximum lie on a floating grid, so its points stay (up to rounding); pruning prunes zeros.
        np.testing.assert_allclose(twice, once, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_strides_make_no_difference_for_any_type(policy, kind, dtype):
    x = torch.from_numpy(random_tokens(2, 70, 48)).to(dtype)
    expected = simulate_tensor(x, policy, kind, head_dim=16)
    assert expected.dtype == dtype and expected.shape == x.shape
    wide = torch.zeros(2, 140, 96, dtype=dtype)
    wide[:, ::2, ::2] = x
    for view in (wide[:, ::2, ::2], x.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(simulate_tensor(view, policy, kind, head_dim=16), expected)


def test_numpy_views_of_any_stride_work():
    x = random_tokens(70, 48)
    expected = simulate_tensor(x, "int4")
    np.testing.assert_array_equal(simulate_tensor(x[::-1].copy()[::-1], "int4"), expected)
    np.testing.assert_array_equal(simulate_tensor(np.asfortranarray(x), "int4"), expected)
    packed = np.zeros(70, np.dtype([("tag", "u1"), ("x", "f4", 48)]))
    packed["x"] = x
    np.testing.assert_array_equal(simulate_tensor(packed["x"], "int4"), expected)


@pytest.mark.parametrize("policy", ["fp16", "int16"])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_sixteen_bits_copy_every_bit_also_of_nan(policy, kind):
    x = random_tokens(9, 8)
    x[3, 4], x[5, 1], x[0, 0] = np.nan, -np.inf, -0.0
    tally = BitsTally()
    np.testing.assert_array_equal(bits_of(simulate_tensor(x, policy, kind, tally=tally)), bits_of(x))
    assert tally == BitsTally(72, 72 * 16)


def test_the_policy_text_names_the_native_call_it_makes():
    x = random_tokens(100, 32)
    expected, _ = ops.simulate_uniform(x, 4, axis="per_channel", outlier_fraction=0.01, protected_tokens=1)
    np.testing.assert_array_equal(simulate_tensor(x, "int4+1%+sink", "key"), expected)
    expected, _ = ops.simulate_uniform(x, 4, axis="per_token", outlier_fraction=0.01, protected_tokens=1)
    np.testing.assert_array_equal(simulate_tensor(x, "int4+1%+sink", "value"), expected)
    expected, _ = ops.simulate_uniform(x, 2, axis="per_channel", group=32, offset="clamp", mode="causal")
    np.testing.assert_array_equal(simulate_tensor(x, "kivi-2+clamp", "key", mode="causal"), expected)
    expected, _ = ops.prune_magnitude(x, 0.7, head_dim=16, rule="kth_value")
    np.testing.assert_array_equal(simulate_tensor(x, "mustafar-70+kth_value", "key", head_dim=16), expected)


def test_window_is_left_out_of_what_the_native_call_sees():
    x = random_tokens(100, 32)
    expected, _ = ops.simulate_uniform(x[:90], 4, axis="per_channel", protected_tokens=2)
    np.testing.assert_array_equal(simulate_tensor(x, "int4+sink2+window10")[:90], expected)


def test_out_receives_the_result_and_may_be_x():
    x = random_tokens(40, 16)
    expected = simulate_tensor(x, "int4+window3")
    out = np.full_like(x, np.nan)
    assert simulate_tensor(x, "int4+window3", out=out) is out
    np.testing.assert_array_equal(out, expected)
    simulate_tensor(x, "int4+window3", out=x)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize(
    ("policy", "kind", "shape", "bits"),
    [
        # 4 bits an element, 32 per vector: 100 channels, or 50 tokens.
        ("int4", "key", (50, 100), 4 * 5000 + 32 * 100),
        ("int4", "value", (50, 100), 4 * 5000 + 32 * 50),
        # Two sequences own their vectors each.
        ("int4", "key", (2, 50, 100), 2 * (4 * 5000 + 32 * 100)),
        # Groups of 32 tokens: 50 tokens are two groups.
        ("kivi-2", "key", (50, 100), 2 * 5000 + 32 * 100 * 2),
        ("kivi-2", "value", (50, 100), 2 * 5000 + 32 * 50 * 4),
        # The incomplete group of a causal cache is 16 bits wide.
        ("kivi-2+causal", "key", (50, 100), 2 * 3200 + 32 * 100 + 16 * 1800),
        ("int4+causal", "key", (50, 100), 16 * 5000),
        # Sink and window tokens are 16 bits wide and own no vector.
        ("int4+sink2", "key", (50, 100), 4 * 4800 + 32 * 100 + 16 * 200),
        ("int4+sink2+window8", "value", (50, 100), 4 * 4000 + 32 * 40 + 16 * 1000),
        ("int4+sink2+window48", "value", (50, 100), 16 * 5000),
        # 2 % of 100: one element at each end of a token's row (quantiles 0.99 and 0.01 lie between two of them).
        ("int4+2%", "value", (50, 100), 4 * 5000 + (32 + 32) * 50 + 32 * 2 * 50),
        # Bitmap, and half of each row of 20 in fp16.
        ("mustafar-50", "key", (50, 100), 5000 + 16 * 2500),
        ("mustafar-50+sink2", "key", (50, 100), 4800 + 16 * 2400 + 16 * 200),
        ("fp16", "key", (50, 100), 16 * 5000),
        ("int4", "key", (0, 100), 0),
    ],
)
def test_bits_are_counted_honestly(policy, kind, shape, bits):
    tally = BitsTally()
    simulate_tensor(random_tokens(*shape), policy, kind, head_dim=20, tally=tally)
    assert tally == BitsTally(int(np.prod(shape)), bits)


def test_a_tally_adds_up_and_starts_at_sixteen():
    tally = BitsTally()
    assert tally.bits_per_element == 16.0
    tally.add(10, 40)
    tally.add(10, 160)
    assert tally.bits_per_element == 10.0


def test_a_value_that_is_not_finite_is_refused_with_its_coordinate():
    x = random_tokens(50, 20)
    x[17, 3] = np.nan
    with pytest.raises(ValueError, match="17.*3"):
        simulate_tensor(x, "int4")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": np.zeros((2, 2), np.int32)}, TypeError, "int32"),
        ({"x": [[1.0]]}, TypeError, "list"),
        ({"x": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "int64"),
        ({"x": np.zeros(4, np.float32)}, ValueError, r"\(4,\)"),
        ({"x": np.zeros((1, 2, 3, 4), np.float32)}, ValueError, r"\(1, 2, 3, 4\)"),
        ({"kind": "query"}, ValueError, "query.*key, value"),
        ({"mode": "future"}, ValueError, "future.*oracle, causal"),
        ({"head_dim": 3}, ValueError, "4.*3"),
        ({"head_dim": 0}, ValueError, "head_dim is 0"),
        ({"policy": "int6"}, ValueError, "int6"),
        ({"policy": 4}, TypeError, "int"),
        ({"out": np.zeros((4, 5), np.float32)}, ValueError, r"\(4, 5\).*\(4, 4\)"),
        ({"out": np.zeros((4, 4), np.float16)}, ValueError, "float16.*float32"),
        ({"out": torch.zeros(4, 4)}, ValueError, "Tensor.*ndarray"),
    ],
)
def test_bad_arguments_are_refused_with_both_values(arguments, error, words):
    with pytest.raises(error, match=words):
        simulate_tensor(**{"x": np.zeros((4, 4), np.float32), "policy": "int4", **arguments})
