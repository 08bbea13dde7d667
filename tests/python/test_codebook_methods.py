"""Codebook and rotated methods: what they do to a tensor, what that costs, and which calibrations they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_calibrations import make_calibration
from tiny_models import logits_of, make_ids, make_model

import kvpack
from kvpack import codebook_ops
from kvpack.policy import parse_policy
from kvpack.simulation import BitsTally, simulate_tensor

CHANNELS, TOKENS = 32, 96


def make_matrix(tokens: int = TOKENS, channels: int = CHANNELS) -> np.ndarray:
    generator = np.random.default_rng(3)
    scales = generator.uniform(0.2, 4.0, channels)
    return (generator.standard_normal((tokens, channels)) * scales + generator.standard_normal(channels)).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def calibration():
    return make_calibration(layers=2, kv_heads=2, head_dim=16)


def error_of(x, y) -> float:
    return float(((x - y) ** 2).sum() / (x**2).sum())


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "axis"), [("key", "per_channel"), ("value", "per_token")])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_nuq_reads_the_codebook_of_its_layer_and_kind(calibration, kind, axis, bits):
    x = make_matrix()
    for layer in (0, 1):
        found = simulate_tensor(x, f"nuq{bits}+1%+sink", kind, layer=layer, calibration=calibration)
        expected, _ = codebook_ops.simulate_quantized(
            x,
            bits,
            axis=axis,
            codebook=calibration.codebook(layer, kind, bits),
            outlier_fraction=0.01,
            protected_tokens=1,
        )
        assert np.array_equal(found, expected) and np.array_equal(found[0], x[0])
    other = simulate_tensor(x, f"nuq{bits}+1%+sink", kind, layer=0, calibration=calibration)
    assert not np.array_equal(found, other)


def test_q_norm_moves_centroids(calibration):
    x = make_matrix()
    plain, moved = (
        simulate_tensor(x, name, "value", layer=0, calibration=calibration) for name in ("nuq3", "nuq3+qnorm")
    )
    expected, _ = codebook_ops.simulate_quantized(
        x,
        3,
        axis="per_token",
        codebook=calibration.codebook(0, "value", 3),
        norm=calibration.norm(0, "value", 3),
    )
    assert np.array_equal(moved, expected) and not np.array_equal(plain, moved)


@pytest.mark.parametrize("name", ["int3", "nuq3", "nf3"])
def test_calibrated_keys_use_static_ranges_and_values_their_own(calibration, name):
    x = make_matrix()
    policy = f"{name}+1%+calibrated"
    codebook = {
        "int3": None,
        "nuq3": calibration.codebook(1, "key", 3),
        "nf3": codebook_ops.nf_codebook(3),
    }[name]
    lower, upper = calibration.thresholds(1, "key")
    expected, _ = codebook_ops.simulate_quantized(
        x,
        3,
        axis="per_channel",
        codebook=codebook,
        mode="calibrated",
        lower=lower,
        upper=upper,
        outlier_fraction=0.01,
    )
    assert np.array_equal(simulate_tensor(x, policy, layer=1, calibration=calibration), expected)
    values = simulate_tensor(x, policy, "value", layer=1, calibration=calibration)
    assert np.array_equal(values, simulate_tensor(x, f"{name}+1%", "value", layer=1, calibration=calibration))
    assert parse_policy(policy).mode == "calibrated"


def test_calibrated_keys_do_not_depend_on_later_tokens(calibration):
    x = make_matrix()
    changed = x.copy()
    changed[-1] *= 50
    first, second = (simulate_tensor(m, "nuq4+1%+calibrated", layer=0, calibration=calibration) for m in (x, changed))
    assert np.array_equal(first[:-1], second[:-1])


def test_nf_needs_no_calibration_and_beats_nothing_it_should_not():
    x = make_matrix()
    errors = [error_of(x, simulate_tensor(x, f"nf{bits}")) for bits in (2, 3, 4, 5)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_turbo_rotates_heads_and_leaves_protected_tokens_alone(dtype):
    x = torch.from_numpy(make_matrix(40, 128)).to(dtype)
    for bits, limit in ((2, 0.15), (3, 0.045), (4, 0.013)):
        y = simulate_tensor(x, f"turbo-{bits}+sink4", "key", head_dim=64)
        assert y.dtype == dtype and torch.equal(y[:4], x[:4])
        # The Lloyd-Max quantiser of a normal variable leaves 0.1175, 0.0345 and 0.0095 of its variance.
        assert 0.5 * limit < error_of(x[4:].float(), y[4:].float()) < limit
    assert torch.equal(simulate_tensor(x, "turbo-2+sink64", "key", head_dim=64), x)


def test_turbo_has_one_rotation_per_seed():
    x = make_matrix(20, 64)
    first, again, other = (simulate_tensor(x, name, head_dim=32) for name in ("turbo-3", "turbo-3", "turbo-3+seed7"))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert parse_policy("turbo-3").key.stage == "post_rope"
    assert parse_policy("turbo-3+pre_rope").key.stage == "pre_rope"
    x[3, 5] = np.nan
    with pytest.raises(ValueError, match="token 3, channel 5"):
        simulate_tensor(x, "turbo-3+sink", head_dim=32)


@pytest.mark.parametrize("name", ["int4+1%", "nf4+1%"])
def test_compat_is_the_published_tool(name):
    x = make_matrix()
    x[:, 2] = 1.5
    ours, theirs = simulate_tensor(x, name), simulate_tensor(x, f"{name}+compat")
    assert np.abs(ours - theirs).max() < 1e-4


# --- bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "kind", "vector_bits", "tables"),
    [
        ("nuq3", "key", 32 * CHANNELS, 8 * 32),
        ("nuq3+qnorm", "key", 32 * CHANNELS, 10 * 32),
        ("nuq3", "value", 32 * TOKENS, 8 * 32),
        ("nf3", "key", 32 * CHANNELS, 0),
    ],
)
def test_codebooks_cost_bits_once_per_sequence(calibration, policy, kind, vector_bits, tables):
    x = np.stack([make_matrix(), make_matrix()[::-1]])
    tally = BitsTally()
    simulate_tensor(x, policy, kind, layer=0, calibration=calibration, tally=tally)
    assert tally == BitsTally(x.size, 3 * x.size + 2 * (vector_bits + tables), 2 * tables)
    assert tally.table_bits_per_element == 2 * tables / x.size


def test_static_ranges_are_tables_and_no_part_of_vectors(calibration):
    x = make_matrix()
    tally, count = BitsTally(), {}
    simulate_tensor(x, "nuq3+1%+calibrated", layer=0, calibration=calibration, tally=tally)
    lower, upper = calibration.thresholds(0, "key")
    count = int(((x < lower) | (x > upper)).sum())
    tables = 8 * 32 + 32 * CHANNELS
    assert tally == BitsTally(x.size, 3 * x.size + 32 * CHANNELS + 32 * count + tables, tables)


def test_turbo_costs_its_bits_and_one_scale_per_head():
    tally = BitsTally()
    simulate_tensor(make_matrix(10, 128), "turbo-3", head_dim=64, tally=tally)
    assert tally.bits_per_element == 3.25
    tally = BitsTally()
    simulate_tensor(make_matrix(10, 128), "turbo-3+sink2", head_dim=64, tally=tally)
    assert tally.bits_per_element == pytest.approx(0.8 * 3.25 + 0.2 * 16)


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "options", "words"),
    [
        ("nuq3", {}, "'nuq3' needs a calibration.*kvpack calibrate"),
        ("int4+1%+calibrated", {}, "needs a calibration"),
        ("nuq3", {"calibration": True}, "say which layer"),
        ("nuq3", {"calibration": True, "layer": 7}, "no keys of layer 7; it has layers 0, 1"),
        ("int4+calibrated", {"calibration": True, "layer": 0}, "leave 1% outside and the policy keeps 0%"),
        ("nuq4+2%+calibrated", {"calibration": True, "layer": 0}, "--outliers 2%"),
    ],
)
def test_a_calibration_that_is_missing_or_does_not_fit_is_refused(calibration, policy, options, words):
    options = {**options, "calibration": calibration} if "calibration" in options else options
    with pytest.raises(ValueError, match=words):
        simulate_tensor(make_matrix(), policy, **options)


def test_other_channels_or_bits_are_refused(calibration):
    with pytest.raises(ValueError, match="32 channels.*x has 16"):
        simulate_tensor(make_matrix(20, 16), "nuq3", layer=0, calibration=calibration)
    few = make_calibration(layers=2, kv_heads=2, head_dim=16, bits=(2, 4))
    with pytest.raises(ValueError, match="no codebook of 3 bits, only of 2, 4.*--bits 3"):
        simulate_tensor(make_matrix(), "nuq3", layer=0, calibration=few)


# --- in a model ---------------------------------------------------------------------------------------------------


def test_every_layer_of_a_model_gets_its_own_codebook():
    model, ids = make_model(), make_ids()
    calibration = make_calibration(model)
    keys = {}
    for layer in (0, 1):
        model.model.layers[layer].self_attn.k_proj.register_forward_hook(
            lambda m, a, out, layer=layer: keys.__setitem__(layer, out.clone())
        )
    with kvpack.simulate(model, "nuq3+1%", calibration=calibration, measure_errors=True) as simulation:
        logits_of(model, ids)
    for layer in (0, 1):
        expected = simulate_tensor(keys[layer], "nuq3+1%", layer=layer, calibration=calibration)
        wanted = ((keys[layer] - expected).double() ** 2).sum() / (keys[layer].double() ** 2).sum()
        error = simulation.layer_errors[2 * layer]
        assert (error["layer"], error["kind"]) == (layer, "key")
        assert error["relative_error"] == pytest.approx(wanted.item(), rel=1e-6)
    assert simulation.tally.table_bits == 2 * 2 * 2 * 8 * 32  # layers, kinds, sequences, centroids, bits


@pytest.mark.parametrize("policy", ["nuq3+calibrated+1%+window16", "turbo-3", "nf4+causal"])
def test_codebook_policies_run_in_models(policy):
    model, ids = make_model(), make_ids()
    with kvpack.simulate(model, policy, calibration=make_calibration(model)) as simulation:
        assert torch.isfinite(logits_of(model, ids)).all()
    assert 0 < simulation.tally.table_bits_per_element < 1 or "nuq" not in policy


def test_a_model_without_its_calibration_is_refused(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="'nuq3' needs a calibration"):
        kvpack.simulate(model, "nuq3")
    other = make_calibration(make_model(num_hidden_layers=1))
    with pytest.raises(ValueError, match="no keys of layer 1"):
        kvpack.simulate(model, "nuq3", calibration=other)
    qwen = make_calibration(make_model("Qwen2"))
    with pytest.raises(ValueError, match="belongs to another model"):
        kvpack.simulate(model, "nuq3", calibration=qwen)
    path = tmp_path / "tiny.safetensors"
    make_calibration(model).save(path)
    with kvpack.simulate(model, "nuq3;layers1=fp16", calibration=path) as simulation:
        logits_of(model, make_ids())
    assert simulation.tally.elements
    kvpack.simulate(model, "int4", calibration=qwen)  # reads none of it
