"""klt with keys and values of a layer in one row: names, bytes, the model's hooks, and what it is for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from klt_calibrations import make_gradients, make_header, make_klt_calibration, make_states
from listeners import Recorder
from saved_models import write_words
from tiny_models import logits_of, make_ids, make_model

import kvpack
from kvpack import BitsTally, simulate_pair, simulate_tensor
from kvpack.calibrate import CalibrationError, KltCalibration, Request, klt_recipe, prepare, run
from kvpack.calibrate.fingerprint import ModelFingerprint
from kvpack.calibrate.klt_fit import KltFitOptions, fit_klt_layer
from kvpack.calibrate.recipes import recipes
from kvpack.klt import compress_klt, unpack_klt
from kvpack.klt_joint import MOST_CHANNELS, join_heads, split_heads
from kvpack.klt_methods import choices_of, describe_tables, layer_bits
from kvpack.klt_tables import find_codecs
from kvpack.policy import Policy, parse_policy


@pytest.fixture(scope="module")
def calibration():
    return make_klt_calibration(layers=3, head_dim=16)


def make_pair(tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = (make_states(tokens, 32, seed).view(2, tokens // 2, 32).to(torch.float16) for seed in (2, 3))
    return key, value


@pytest.mark.parametrize("library", [torch.from_numpy, np.asarray])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_heads_stand_side_by_side_and_come_apart_again(library: Any, leading: tuple[int, ...]) -> None:
    key = np.arange(np.prod((*leading, 6)), dtype=np.float32).reshape(*leading, 6)
    value = -1 - key
    joint = join_heads(library(key), library(value), 3)
    rows = np.asarray(joint).reshape(-1, 12)
    for row, keys, values in zip(rows, key.reshape(-1, 6), value.reshape(-1, 6), strict=True):
        assert row.tolist() == [*keys[:2], *values[:2], *keys[2:4], *values[2:4], *keys[4:], *values[4:]]
    for found, expected in zip(split_heads(joint, 3), (key, value), strict=True):
        assert type(found) is type(joint)
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_pairs_that_do_not_fit_are_refused_with_both_sides() -> None:
    with pytest.raises(ValueError, match=r"key is \(4, 6\) torch.float32, value is \(4, 8\)"):
        join_heads(torch.zeros(4, 6), torch.zeros(4, 8), 2)
    with pytest.raises(ValueError, match=r"torch.float32, value is \(4, 6\) torch.float16"):
        join_heads(torch.zeros(4, 6), torch.zeros(4, 6).half(), 2)
    with pytest.raises(ValueError, match="6 channels; 4 heads do not divide"):
        join_heads(torch.zeros(4, 6), torch.zeros(4, 6), 4)
    with pytest.raises(ValueError, match="key is on cpu, value is on meta"):
        join_heads(torch.zeros(4, 6), torch.zeros(4, 6, device="meta"), 2)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("klt-2.4-joint", "klt-2.4-joint"),
        ("klt-2-joint+sink+window16", "klt-2-joint+sink+window16"),
        ("klt-2-joint-heads1", "klt-2-joint-heads1"),
        ("klt-2-fast-joint", "klt-2-fast-joint"),
        ("klt-2-fast-joint-headsall", "klt-2-fast-joint-headsall"),
        ("klt-2-fast-joint-heads1", "klt-2-fast-joint"),
        ("k:klt-2-joint,v:klt-2-joint", "klt-2-joint"),
        ("klt-2-joint;layers0=k:klt-2,v:int4;layers1=fp16", "klt-2-joint;layers0=k:klt-2,v:int4;layers1=fp16"),
    ],
)
def test_text_and_json_make_the_same_policy_again(text: str, canonical: str) -> None:
    policy = parse_policy(text)
    assert policy.to_text() == canonical
    assert parse_policy(canonical) == policy == Policy.from_json(policy.to_json())


@pytest.mark.parametrize(
    "text",
    [
        "k:klt-2-joint,v:klt-2",
        "k:klt-2-joint,v:klt-3-joint",
        "k:int4,v:klt-2-joint",
        "klt-2;layers0=k:klt-2-joint,v:fp16",
    ],
)
def test_a_joint_method_is_for_both_or_for_none(text: str) -> None:
    with pytest.raises(ValueError, match="together is given to both"):
        parse_policy(text)


@pytest.mark.parametrize("name", ["klt-2.4-joint", "klt-2-joint-heads1", "klt-3-fast-joint"])
@pytest.mark.parametrize("sink", [0, 3, 40])
def test_bits_are_those_of_the_bytes_and_simulation_is_what_they_unpack_to(calibration, name: str, sink: int) -> None:
    base = parse_policy(name)
    policy = Policy(base.key, base.value, sink=sink)
    key, value = make_pair()
    before = key.clone(), value.clone()
    tally = BitsTally()
    found = simulate_pair(key, value, policy, layer=1, head_dim=16, calibration=calibration, tally=tally)
    tables = find_codecs(calibration, choices_of(policy, calibration))[1, "joint"].tables
    rows = compress_klt(join_heads(key, value, 2), tables, protected_tokens=min(sink, 20))
    assert tally.bits == 8 * rows.nbytes and tally.table_bits == 0 and tally.elements == 2 * key.numel()
    for out, expected, dense in zip(found, split_heads(unpack_klt(rows, tables), 2), before, strict=True):
        assert torch.equal(out, expected) and torch.equal(out[:, :sink], dense[:, :sink])
    assert torch.equal(key, before[0]) and torch.equal(value, before[1])


def test_numpy_and_torch_agree_and_recent_tokens_stay(calibration) -> None:
    key, value = (x[0] for x in make_pair())
    options = {"layer": 0, "calibration": calibration}
    tally = BitsTally()
    found = simulate_pair(key, value, "klt-3-joint+sink2+window5", tally=tally, **options)
    from_numpy = simulate_pair(key.numpy()[::-1][::-1], value.numpy(), "klt-3-joint+sink2+window5", **options)
    short = simulate_pair(key[:15], value[:15], "klt-3-joint+sink2", **options)
    for out, other, cut, dense in zip(found, from_numpy, short, (key, value), strict=True):
        np.testing.assert_array_equal(other, out.numpy())
        assert torch.equal(out[15:], dense[15:]) and torch.equal(out[:2], dense[:2])
        assert torch.equal(out[:15], cut)
    row_bytes = find_codecs(calibration, choices_of(parse_policy("klt-3-joint"), calibration))[0, "joint"].row_bytes
    assert tally.bits == 13 * 8 * row_bytes + 7 * 2 * 32 * 16
    nothing = simulate_pair(key[:0], value[:0], "klt-3-joint", **options)
    assert [tuple(out.shape) for out in nothing] == 2 * [(0, 32)]


def test_a_pair_of_other_policies_is_each_alone(calibration) -> None:
    key, value = make_pair()
    options = {"layer": 1, "calibration": calibration, "head_dim": 16}
    for policy in ("int4+1%+sink", "k:klt-3,v:int2"):
        tallies = BitsTally(), BitsTally()
        found = simulate_pair(key, value, policy, tally=tallies[0], **options)
        for out, x, kind in zip(found, (key, value), ("key", "value"), strict=True):
            assert torch.equal(out, simulate_tensor(x, policy, kind, tally=tallies[1], **options))
        assert tallies[0] == tallies[1]


def test_one_kind_alone_is_refused_with_what_takes_both(calibration) -> None:
    with pytest.raises(ValueError, match="together, and x is keys alone; simulate_pair takes both"):
        simulate_tensor(make_pair()[0], "klt-2-joint", layer=0, calibration=calibration)
    with pytest.raises(ValueError, match="32 channels for the keys of layer 0; x has 48"):
        simulate_pair(torch.zeros(4, 48), torch.zeros(4, 48), "klt-2-joint", layer=0, calibration=calibration)
    with pytest.raises(ValueError, match="key is .* value is"):
        simulate_pair(torch.zeros(4, 32), torch.zeros(5, 32), "klt-2-joint", layer=0, calibration=calibration)
    with pytest.raises(ValueError, match="needs a calibration"):
        simulate_pair(torch.zeros(4, 32), torch.zeros(4, 32), "klt-2-joint", layer=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_named_where_the_caller_has_it(calibration, bad: float) -> None:
    key, value = make_pair()
    value[1, 3, 17] = bad
    options = {"layer": 0, "calibration": calibration}
    with pytest.raises(ValueError, match=f"value holds {bad} at sequence 1, token 3, channel 17"):
        simulate_pair(key, value, "klt-2-joint", **options)
    with pytest.raises(ValueError, match=f"value holds {bad} at sequence 0, token 3, channel 17"):
        simulate_pair(key[1].numpy(), value[1].numpy(), "klt-2-joint", **options)


@pytest.mark.parametrize("head_dim", [0, -8, "8"])
def test_a_head_dim_that_cannot_be_is_refused(calibration, head_dim: Any) -> None:
    key, value = make_pair()
    for policy in ("klt-2-joint", "int4"):
        with pytest.raises(ValueError, match=f"head_dim is {head_dim!r}"):
            simulate_pair(key, value, policy, layer=0, calibration=calibration, head_dim=head_dim)


def test_a_budget_is_spent_but_never_exceeded_and_told_for_both_kinds(calibration) -> None:
    for name, budget in (("klt-1.5-joint", 1.5), ("klt-2.4-joint", 2.4), ("klt-3-fast-joint", 3)):
        told = layer_bits(parse_policy(name), calibration)
        assert [(entry["layer"], entry["kind"]) for entry in told] == [
            (layer, kind) for layer in range(3) for kind in ("key", "value")
        ]
        assert all(a["bits"] == b["bits"] for a, b in zip(told[::2], told[1::2], strict=True))
        assert 0.85 * budget < np.mean([entry["bits"] for entry in told]) <= budget
    policy = parse_policy("klt-2-joint")
    codecs = find_codecs(calibration, choices_of(policy, calibration))
    assert sorted(codecs) == [(layer, "joint") for layer in range(3)]
    told = describe_tables(policy, calibration)
    assert told["static_table_tokens"] == round(told["static_table_bytes"] / (2 * 6 * 32), 1)


def test_keys_and_values_of_one_hidden_state_lose_less_together() -> None:
    """The same bits, rows of 16 keys and 16 values that are noisy views of 16 numbers."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2000, 16)) * np.geomspace(4, 0.2, 16)
    views = [hidden @ rng.standard_normal((16, 16)) + 0.05 * rng.standard_normal((2000, 16)) for _ in range(2)]
    states = [torch.from_numpy(view.astype(np.float32)) for view in views]
    fingerprint = ModelFingerprint("LlamaForCausalLM", 1, 2, 8, "signs-sha256:" + "0" * 32)
    gradients = [make_gradients(1500, 16, seed) for seed in (0, 1)]
    options = KltFitOptions(8, (1, 2), 0.0, 4096, 0)
    parts: dict[Any, Any] = {
        (0, kind): fit_klt_layer(x[:1500], options, gradients=g)
        for kind, x, g in zip(("key", "value"), states, gradients, strict=True)
    }
    both = KltFitOptions(16, (1, 2), 0.0, 4096, 0)
    joined = (join_heads(*(x[:1500] for x in states), 2), join_heads(*gradients, 2))
    parts[0, "joint"] = fit_klt_layer(joined[0], both, gradients=joined[1])
    calibration = KltCalibration(make_header(fingerprint), parts)
    fisher = [g.double().T @ g.double() for g in gradients]
    losses = {}
    for name in ("klt-2.5", "klt-2.5-joint"):
        tally = BitsTally()
        fresh = [x[1500:] for x in states]
        found = simulate_pair(*fresh, name, layer=0, calibration=calibration, tally=tally)
        errors = [(out - x).double() for out, x in zip(found, fresh, strict=True)]
        losses[name] = sum(float((e @ f * e).sum()) for e, f in zip(errors, fisher, strict=True))
        assert tally.bits_per_element <= 2.5
    assert losses["klt-2.5-joint"] < 0.6 * losses["klt-2.5"]


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
def test_a_model_sees_what_simulate_pair_makes_of_its_keys_and_values(architecture: str) -> None:
    model, ids = make_model(architecture), make_ids()
    calibration = make_klt_calibration(model)
    exact = logits_of(model, ids)
    seen: dict[str, list[torch.Tensor]] = {"k_proj": [], "v_proj": []}
    attention = model.model.layers[0].self_attn
    dense = [
        getattr(attention, name).register_forward_hook(lambda m, a, out, n=name: seen[n].append(out)) for name in seen
    ]
    logits_of(model, ids)
    with kvpack.simulate(model, "klt-3-joint+sink", calibration=calibration, measure_errors=True) as simulation:
        after = [
            getattr(attention, name).register_forward_hook(lambda m, a, out, n=name: seen[n].append(out))
            for name in seen
        ]
        assert not torch.equal(logits_of(model, ids), exact)
    for hook in (*dense, *after):
        hook.remove()
    expected = simulate_pair(seen["k_proj"][0], seen["v_proj"][0], "klt-3-joint+sink", layer=0, calibration=calibration)
    assert torch.equal(seen["k_proj"][-1], expected[0]) and torch.equal(seen["v_proj"][-1], expected[1])
    # One of 80 tokens is exact.
    assert 0.8 * 3 < simulation.tally.bits_per_element <= 3 * 79 / 80 + 16 / 80
    errors = simulation.layer_errors
    assert [(entry["layer"], entry["kind"]) for entry in errors[:3]] == [(0, "key"), (0, "value"), (1, "key")]
    assert all(entry["relative_error"] > 0 for entry in errors) and simulation.attention_errors
    assert torch.equal(logits_of(model, ids), exact)


def test_some_layers_joint_and_a_recent_window() -> None:
    model, ids = make_model("Llama"), make_ids()
    calibration = make_klt_calibration(model)
    policy = "klt-2-joint+sink+window8;layers0=k:int4,v:klt-2"
    with kvpack.simulate(model, policy, calibration=calibration) as simulation:
        windowed = logits_of(model, ids)
    with kvpack.simulate(model, policy.replace("+window8", ""), calibration=calibration):
        assert not torch.equal(logits_of(model, ids), windowed)
    assert 2 < simulation.tally.bits_per_element < 5


def test_what_a_joint_simulation_cannot_do_is_said() -> None:
    model, ids = make_model("Llama"), make_ids()
    calibration = make_klt_calibration(model)
    with (
        kvpack.simulate(model, "klt-3-joint", calibration=calibration),
        pytest.raises(NotImplementedError, match="has no gradient"),
    ):
        model(input_ids=ids).logits.sum().backward()
    attention = model.model.layers[1].self_attn
    copying = attention.v_proj.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    with (
        kvpack.simulate(model, "klt-3-joint", calibration=calibration),
        pytest.raises(NotImplementedError, match="layer 1 .* different inputs"),
    ):
        logits_of(model, ids)
    copying.remove()
    adding = attention.v_proj.register_forward_hook(lambda module, args, out: out + 1)
    with (
        kvpack.simulate(model, "klt-3-joint", calibration=calibration),
        pytest.raises(NotImplementedError, match="layer 1 .* puts out other values than forward"),
    ):
        logits_of(model, ids)
    adding.remove()
    with torch.no_grad():
        attention.v_proj.weight[3] = float("inf")
    calibration.model = type(calibration.model).of(model)
    with (
        kvpack.simulate(model, "klt-3-joint", calibration=calibration),
        pytest.raises(ValueError, match="layer 1 values: .* at "),
    ):
        logits_of(model, ids)


def test_joint_parts_of_another_width_are_refused(calibration) -> None:
    narrow = make_klt_calibration(layers=3, head_dim=8)
    with pytest.raises(CalibrationError, match="layer 0 keys with values have 32 channels; keys have 32, values 32"):
        KltCalibration(calibration.header, calibration.parts | {(0, "joint"): narrow.parts[0, "joint"]})


def test_rows_of_both_end_where_the_native_code_ends() -> None:
    header = Path(__file__).parents[2] / "include" / "kvpack" / "klt.h"
    assert f"kMaxKltChannels = {MOST_CHANNELS};" in header.read_text(encoding="utf-8")


def test_keys_and_values_of_other_widths_are_each_calibrated_alone(model_folder: Path, tmp_path: Path) -> None:
    loaded = SimpleNamespace(head_dim=8, kv_heads=2, model=make_model("Llama"))
    recipe = recipes()["klt"]
    asked = Request(str(model_folder), tmp_path / "out.klt", method="klt")
    assert recipe.fields_of_model(asked, loaded) == {"blocks": [1, 2], "joint": True}
    assert recipe.notes(loaded, {"blocks": [1, 2]}) == []
    attention = loaded.model.model.layers[1].self_attn
    attention.v_proj = torch.nn.Linear(64, 24)
    assert recipe.fields_of_model(asked, loaded)["joint"] is False
    (note,) = recipe.notes(loaded, {"blocks": [1, 2]})
    assert "layer 1 has " in note and "channels of keys and 24 of values" in note


def test_a_model_too_wide_for_joint_rows_is_calibrated_without_them(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(klt_recipe, "MOST_CHANNELS", 31)
    words = write_words(tmp_path / "words.txt", 2000)
    asked = Request(
        str(model_folder), tmp_path / "out.klt", (str(words),), method="klt", nsamples=2, seqlen=24
    )  # fmt: skip
    heard = Recorder()
    run(prepare(asked), heard)
    assert "klt-B-joint: blocks of 2 heads would have 32 channels of 31 at most" in heard.notes[-1]
    made = KltCalibration.load(asked.output)
    assert sorted(made.parts) == [(layer, kind) for layer in range(3) for kind in ("key", "value")]
    x = torch.zeros(4, 16)
    simulate_tensor(x, "klt-2", layer=0, calibration=made)
    with pytest.raises(
        ValueError, match=r"no keys with values: .* blocks of 2 heads are too large for both \(32 channels"
    ):
        simulate_pair(x, x, "klt-2-joint", layer=0, calibration=made)
    with pytest.raises(ValueError, match="no keys with values of layer 7; it has layers 0, 1, 2"):
        simulate_pair(x, x, "klt-2-joint", layer=7, calibration=made)
