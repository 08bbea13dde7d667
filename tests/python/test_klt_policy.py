"""klt as a policy: names and JSON, whole budgets, honest bytes, and every calibration that does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibrations import make_calibration
from klt_calibrations import make_klt_calibration, make_states
from tiny_models import logits_of, make_ids, make_model

import kvpack
from kvpack.calibration_checks import check_calibration
from kvpack.klt import compress_klt, unpack_klt
from kvpack.klt_methods import KltMethod, choices_of, describe_tables, layer_bits
from kvpack.klt_tables import find_codecs
from kvpack.policy import Policy, parse_policy
from kvpack.simulation import BitsTally, simulate_tensor


@pytest.fixture(scope="module")
def calibration():
    return make_klt_calibration(layers=3, head_dim=16)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("klt-2.4", "klt-2.4"),
        ("klt-2.40+sink", "klt-2.4+sink"),
        ("klt-6", "klt-6"),
        ("klt-2.4-fast", "klt-2.4-fast"),
        ("klt-2.4-headsall", "klt-2.4"),
        ("klt-2.4-heads1", "klt-2.4-heads1"),
        ("klt-2.4-fast-headsall", "k:klt-2.4-fast-headsall,v:klt-2.4-fast"),
        ("klt-2.4-fast-heads1", "k:klt-2.4-fast,v:klt-2.4-fast-heads1"),
        ("k:klt-2-heads1+sink4,v:klt-2+sink4", "k:klt-2-heads1+sink4,v:klt-2+sink4"),
        ("klt-3.25+window16;layers0-1=fp16;layers2=klt-5", "klt-3.25+window16;layers0-1=fp16;layers2=klt-5"),
    ],
)
def test_text_and_json_make_the_same_policy_again(text: str, canonical: str) -> None:
    policy = parse_policy(text)
    assert policy.to_text() == canonical
    assert parse_policy(canonical) == policy == Policy.from_json(policy.to_json())
    assert policy.needs_calibration and policy.shown_mode == "calibrated"


def test_a_mixed_policy_is_told_with_its_own_mode() -> None:
    assert parse_policy("k:klt-2.4,v:int4").shown_mode == "oracle"
    assert parse_policy("k:klt-2.4,v:fp16").shown_mode == "calibrated"
    assert parse_policy("fp16").shown_mode == "oracle"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("klt-0.9", "bits is 0.9; klt takes 1 to 6"),
        ("klt-6.1", "bits is 6.1"),
        ("klt-0", "bits is 0"),
        ("klt-", "unknown policy"),
        ("klt-two", "unknown policy"),
        ("klt-2.4-slow", "unknown policy"),
        ("klt-2.4-heads0", "heads is 0"),
        ("klt-2.4-heads999999", "heads is 999999"),
        ("klt-2.4+1%", "no modifier"),
        ("klt-2.4+compat", "unknown modifier"),
    ],
)
def test_names_out_of_range_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_policy(text)


@pytest.mark.parametrize("bits", [True, "2", None, float("nan"), float("inf")])
def test_bits_that_are_no_number_are_refused(bits: object) -> None:
    with pytest.raises(ValueError, match="bits is"):
        KltMethod(bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["klt-1", "klt-2", "klt-2.4", "klt-3.4", "klt-6", "klt-2.4-fast", "klt-2.4-heads1"])
def test_a_budget_is_spent_but_never_exceeded(calibration, name: str) -> None:
    bits = [entry["bits"] for entry in layer_bits(parse_policy(name), calibration)]
    budget = parse_policy(name).key.bits
    assert len(bits) == 6 and np.mean(bits) <= budget
    # Rows of 32 channels are short: a byte is a quarter of a bit of an element.
    assert np.mean(bits) > 0.85 * budget


def test_layers_that_matter_more_get_more_bits(calibration) -> None:
    bits = {(entry["layer"], entry["kind"]): entry["bits"] for entry in layer_bits(parse_policy("klt-3"), calibration)}
    assert bits[0, "value"] > bits[2, "value"] and bits[0, "value"] > bits[0, "key"]


def test_what_shares_a_budget_is_what_a_policy_gives_the_same_bits(calibration) -> None:
    alone = layer_bits(parse_policy("klt-3;layers1-2=fp16"), calibration)
    assert [(entry["layer"], entry["kind"]) for entry in alone] == [(0, "key"), (0, "value")]
    assert np.mean([entry["bits"] for entry in alone]) <= 3
    split = layer_bits(parse_policy("k:klt-2,v:klt-4"), calibration)
    for kind, budget in (("key", 2), ("value", 4)):
        mean = np.mean([entry["bits"] for entry in split if entry["kind"] == kind])
        assert 0.85 * budget < mean <= budget


@pytest.mark.parametrize("name", ["klt-2.4", "klt-3-fast", "k:klt-3-heads1,v:klt-3"])
@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("sink", [0, 3, 40])
def test_bits_are_those_of_the_bytes_and_simulation_is_what_they_unpack_to(calibration, name, kind, sink) -> None:
    policy = parse_policy("+sink4".join(name.split("+sink4")))
    policy = Policy(policy.key, policy.value, sink=sink)
    x = make_states(40, 32, 5).view(2, 20, 32).to(torch.float16)
    tally = BitsTally()
    out = simulate_tensor(x, policy, kind, layer=1, head_dim=16, calibration=calibration, tally=tally)
    tables = find_codecs(calibration, choices_of(policy, calibration))[1, kind].tables
    rows = compress_klt(x, tables, protected_tokens=min(sink, 20))
    assert tally.bits == 8 * rows.nbytes and tally.table_bits == 0 and tally.elements == x.numel()
    assert torch.equal(out, unpack_klt(rows, tables))
    assert torch.equal(out[:, :sink], x[:, :sink])


def test_numpy_and_torch_and_in_place_agree(calibration) -> None:
    x = make_states(30, 32, 6)
    options = {"layer": 0, "calibration": calibration}
    out = simulate_tensor(x, "klt-3", "value", **options)
    np.testing.assert_array_equal(simulate_tensor(x.numpy(), "klt-3", "value", **options), out.numpy())
    simulate_tensor(x, "klt-3", "value", out=x, **options)
    assert torch.equal(x, out)


def test_more_bits_and_all_heads_together_come_closer(calibration) -> None:
    x = make_states(400, 32, 3)

    def error(policy: str) -> float:
        return float((simulate_tensor(x, policy, "value", layer=1, calibration=calibration) - x).square().mean())

    assert error("klt-5") < error("klt-3.4") < error("klt-2") < error("klt-1") < float(x.var(dim=0).mean())


def test_equal_policies_share_their_tables(calibration) -> None:
    first = find_codecs(calibration, choices_of(parse_policy("klt-2.4"), calibration))
    assert find_codecs(calibration, choices_of(parse_policy("klt-2.4+sink"), calibration)) is first
    assert find_codecs(calibration, choices_of(parse_policy("klt-2.5"), calibration)) is not first


def test_static_tables_are_told_apart_in_bytes_and_in_tokens(calibration) -> None:
    policy = parse_policy("klt-2.4+sink")
    told = describe_tables(policy, calibration)
    codecs = find_codecs(calibration, choices_of(policy, calibration))
    assert told["static_table_bytes"] == sum(codec.tables.nbytes for codec in codecs.values())
    assert told["static_table_tokens"] == round(told["static_table_bytes"] / (2 * 6 * 32), 1)
    assert describe_tables(parse_policy("int4"), calibration) == {} == describe_tables(policy, None)


def test_calibrations_that_do_not_fit_are_refused_with_both_sides(calibration) -> None:
    with pytest.raises(ValueError, match=r"needs a calibration: .*kvpack calibrate MODEL --method klt"):
        check_calibration(parse_policy("klt-2.4"), None)
    with pytest.raises(
        ValueError, match="reads a calibration of --method klt; calibration was made with --method code"
    ):
        check_calibration(parse_policy("klt-2.4"), make_calibration())
    with pytest.raises(
        ValueError, match="reads a calibration of --method codebook; calibration was made with --method"
    ):
        check_calibration(parse_policy("nuq2"), calibration)
    with pytest.raises(ValueError, match="transforms of 1, 2 heads, not of 3; recalibrate with --blocks 3"):
        check_calibration(parse_policy("klt-2.4-heads3"), calibration)
    only_one = make_klt_calibration(layers=1, blocks=[1])
    with pytest.raises(ValueError, match="transforms of 1 heads, not of 2; recalibrate with --blocks all"):
        check_calibration(parse_policy("klt-2.4"), only_one)
    with pytest.raises(ValueError, match="no keys of layer 3"):
        check_calibration(parse_policy("klt-2.4"), calibration, range(4))
    with pytest.raises(ValueError, match="32 channels for the keys of layer 0; x has 48"):
        simulate_tensor(torch.zeros(4, 48), "klt-2.4", layer=0, calibration=calibration)


def test_a_model_sees_simulated_keys_and_values_within_the_budget() -> None:
    model, ids = make_model("Qwen2"), make_ids()
    calibration = make_klt_calibration(model)
    exact = logits_of(model, ids)
    for policy, budget in (("klt-6+sink", 6), ("klt-2+sink", 2), ("klt-3-fast+sink", 3)):
        with kvpack.simulate(model, policy, calibration=calibration) as simulation:
            assert not torch.equal(logits_of(model, ids), exact)
        # One of 80 tokens is exact.
        assert 0.8 * budget < simulation.tally.bits_per_element <= budget * 79 / 80 + 16 / 80
    assert torch.equal(logits_of(model, ids), exact)


def test_statistics_of_another_model_are_refused_by_fingerprint() -> None:
    calibration = make_klt_calibration(make_model("Llama"))
    with pytest.raises(ValueError, match="belongs to another model: architecture is LlamaForCausalLM"):
        kvpack.simulate(make_model("Mistral"), "klt-2.4", calibration=calibration)


def test_values_that_are_not_finite_are_refused_with_their_place() -> None:
    model = make_model("Llama")
    calibration = make_klt_calibration(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = float("inf")
    calibration.model = type(calibration.model).of(model)
    with pytest.raises(ValueError, match="layer 1 values"), kvpack.simulate(model, "klt-3", calibration=calibration):
        logits_of(model, make_ids())
