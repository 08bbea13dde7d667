"""Mustafar in simulation: the bytes of its tiles and nothing else, blocks after the sink, honest bits, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpack
from kvpack import BitsTally, compress_tile64, ops, parse_policy, simulate_tensor, unpack_tile64

HEAD_DIM, HEADS = 64, 3
names = st.builds(
    lambda percent, bits, rule: f"mustafar-{percent}{bits}{rule}",
    st.sampled_from([0, 30, 50, 70, 99]),
    st.sampled_from(["", "-q1", "-q2", "-q4", "-q8"]),
    st.sampled_from(["", "+kth_value"]),
)
schemes = st.sampled_from(["", "+sink", "+sink3", "+window7", "+sink2+window65", "+causal", "+sink5+causal"])
kinds = st.sampled_from(["key", "value"])
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def random_tokens(tokens: int, seed: int = 0, dtype=torch.float32, batch: int = 2) -> torch.Tensor:
    x = np.random.default_rng(seed).normal(size=(batch, tokens, HEADS * HEAD_DIM))
    return torch.from_numpy(x).to(dtype)


def heads_of(x: torch.Tensor) -> torch.Tensor:
    """[batch, tokens, heads*head_dim] -> [batch, heads, tokens, head_dim]."""
    return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def span_of(policy, kind: str, tokens: int) -> tuple[int, int]:
    """First token in tiles and the one after the last."""
    first, last = policy.sink, tokens - policy.window
    if policy.mode == "causal" and kind == "key" and policy.key.bits < 16:
        last = first + (last - first) // 64 * 64
    return first, max(first, last)


@settings(max_examples=120, deadline=None)
@given(names, schemes, kinds, dtypes, st.integers(0, 200), st.integers(0, 1000))
def test_simulating_is_unpacking_what_was_compressed(name, scheme, kind, dtype, tokens, seed):
    policy = parse_policy(name + scheme)
    method = policy.method_for(kind)
    x = random_tokens(tokens, seed, dtype)
    tally = BitsTally()
    out = simulate_tensor(x, policy, kind, head_dim=HEAD_DIM, tally=tally)
    expected, bits = x.clone(), 16 * x.numel()
    first, last = span_of(policy, kind, tokens)
    if first < last:
        part = heads_of(x[:, first:last])
        part = part.float() if dtype == torch.float64 else part
        tiles = compress_tile64(part, kind, sparsity=method.sparsity, bits=method.bits, rule=method.rule)
        heads_of(expected)[:, :, first:last] = unpack_tile64(tiles).to(dtype)
        bits += 8 * tiles.num_bytes - 16 * part.numel()
    assert out.dtype == dtype and torch.equal(out, expected)
    assert tally == BitsTally(x.numel(), bits)


@pytest.mark.parametrize("name", ["mustafar-70", "mustafar-50-q4+sink", "mustafar-70-q1+window9"])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_batch_is_its_sequences_and_numpy_is_torch(name, kind):
    x = random_tokens(150)
    tallies = BitsTally(), BitsTally()
    together = simulate_tensor(x, name, kind, head_dim=HEAD_DIM, tally=tallies[0])
    for sequence, out in zip(x.numpy(), together.numpy(), strict=True):
        apart = simulate_tensor(sequence, name, kind, head_dim=HEAD_DIM, tally=tallies[1])
        np.testing.assert_array_equal(out, apart)
    assert tallies[0] == tallies[1]


@pytest.mark.parametrize("name", ["mustafar-70-q2", "mustafar-70"])
def test_strides_make_no_difference_and_out_may_be_x(name):
    x = random_tokens(70)
    expected = simulate_tensor(x, name, "key", head_dim=HEAD_DIM)
    wide = torch.zeros(2, 140, 2 * HEADS * HEAD_DIM)
    wide[:, ::2, ::2] = x
    for view in (wide[:, ::2, ::2], x.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(simulate_tensor(view, name, "key", head_dim=HEAD_DIM), expected)
        simulate_tensor(view, name, "key", head_dim=HEAD_DIM, out=view)
        assert torch.equal(view, expected)


def test_values_of_one_head_take_the_bits_of_the_documents():
    x = random_tokens(128, batch=1)
    for name, per_tile in {
        "mustafar-50": 64 + 32 + 32 * 16,
        "mustafar-70": 64 + 32 + 24 * 16,
        "mustafar-50-q4": 64 + 3 * 32 + 32 * 4,
        "mustafar-70-q2": 64 + 3 * 32 + 2 * 32,
    }.items():
        tally = BitsTally()
        simulate_tensor(x, name, "value", head_dim=HEAD_DIM, tally=tally)
        ends = 0 if "q" in name else 64 * HEADS
        assert tally.bits == 128 * HEADS * per_tile + ends


def test_other_heads_are_pruned_in_their_own_type_and_codes_are_refused():
    x = np.random.default_rng(0).normal(size=(50, 160)).astype(np.float32)
    tally = BitsTally()
    out = simulate_tensor(x, "mustafar-70", "key", head_dim=80, tally=tally)
    np.testing.assert_array_equal(out, ops.prune_magnitude(x, 0.7, head_dim=80)[0])
    assert tally.bits == x.size + 16 * 50 * 2 * 24
    for head_dim, shown in ((80, 80), (None, 160)):
        with pytest.raises(
            NotImplementedError, match=f"mustafar-70-q2 exists for head_dim 64, 128, 256, not for {shown}"
        ):
            simulate_tensor(x, "mustafar-70-q2", "key", head_dim=head_dim)


@pytest.mark.parametrize(("name", "head_dim"), [("mustafar-50", 64), ("mustafar-50", 192), ("mustafar-50-q4", 64)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_coordinate(name, value, head_dim):
    x = random_tokens(50)
    x[1, 17, 33] = value
    with pytest.raises(ValueError, match=f"x holds {value} at sequence 1, token 17, channel 33; values must be finite"):
        simulate_tensor(x, name + "+sink", "key", head_dim=head_dim)
    with pytest.raises(ValueError, match="sequence 0, token 17, channel 33"):
        simulate_tensor(x[1].numpy(), name, "value", head_dim=head_dim)
    exact = simulate_tensor(x, name + "+sink18", "key", head_dim=head_dim)
    assert torch.equal(exact[:, :18].nan_to_num(7), x[:, :18].nan_to_num(7))


def test_survivors_that_float16_cannot_hold_are_refused():
    x = random_tokens(50)
    x[0, 3, 5] = 65519.0
    assert simulate_tensor(x, "mustafar-70", head_dim=HEAD_DIM)[0, 3, 5] == 65504.0
    x[0, 3, 5] = -65520.0
    with pytest.raises(ValueError, match="-65520.0 at sequence 0, token 3, channel 5; survivors in float16.*65520"):
        simulate_tensor(x, "mustafar-70", head_dim=HEAD_DIM)
    assert simulate_tensor(x, "mustafar-70-q8", head_dim=HEAD_DIM).isfinite().all()
    x = x.double()
    x[0, 3, 5] = 1e300
    with pytest.raises(ValueError, match="1e.300 at sequence 0, token 3, channel 5"):
        simulate_tensor(x, "mustafar-70-q8", head_dim=HEAD_DIM)


def test_a_policy_that_differs_by_layer_needs_the_layer():
    x = random_tokens(70)
    policy = "int4+sink;layers1-2=mustafar-70-q2;layers5=fp16"
    for layer, name in ((0, "int4+sink"), (2, "mustafar-70-q2+sink"), (5, "fp16")):
        expected = simulate_tensor(x, name, "key", head_dim=HEAD_DIM)
        assert torch.equal(simulate_tensor(x, policy, "key", head_dim=HEAD_DIM, layer=layer), expected)
    with pytest.raises(ValueError, match="differs by layer"):
        simulate_tensor(x, policy, "key", head_dim=HEAD_DIM)
    assert kvpack.simulate_tensor(x, "int4", layer=3).shape == x.shape
