"""Simulation inside tiny models: the right tensors change, and nothing else, and only inside the context."""

import pytest
import torch
import transformers
from tiny_models import FAMILIES, logits_of, make_ids, make_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvpack
from kvpack import BitsTally, ops, simulate, simulate_tensor

POLICIES = ["int8", "int4+1%+sink", "kivi-4", "mustafar-50", "k:fp16,v:int4", "k:kivi-2,v:fp16", "int4+window8+causal"]


def state_of(model: nn.Module) -> list:
    """All that a simulation could leave behind: hooks, replaced methods, the implementation's name."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs), "forward" in vars(m))
        for m in model.modules()
    ]
    return [hooks, model.config._attn_implementation, len(kvpack.models.hooks._ACTIVE)]


def record_attention(model: nn.Module, implementation: str, monkeypatch) -> dict:
    """Lets the base attention implementation write down the keys and values it gets, by layer number."""
    seen = {}
    original = ALL_ATTENTION_FUNCTIONS[implementation]

    def recorder(module, query, key, value, *args, **kwargs):
        seen[module.layer_idx] = key.clone(), value.clone()
        return original(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, implementation, recorder)
    return seen


def matrices(heads: torch.Tensor) -> torch.Tensor:
    """[batch, kv_heads, tokens, head_dim] -> [batch, tokens, kv_heads*head_dim]."""
    return heads.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["fp16", "int16", "k:fp16+sink+window5,v:int16+sink+window5"])
def test_sixteen_bits_are_bit_identical_and_install_nothing(family, policy):
    model, ids = make_model(family), make_ids()
    expected, before = logits_of(model, ids), state_of(model)
    with simulate(model, policy) as simulation:
        assert state_of(model)[:2] == before[:2]
        assert torch.equal(logits_of(model, ids), expected)
    assert simulation.tally.bits_per_element == 16.0
    assert simulation.layer_errors == []


@pytest.mark.parametrize(
    ("family", "implementation"),
    # Gemma2 has no sdpa attention: its scores are soft-capped.
    [(f, i) for f in FAMILIES for i in ("eager", "sdpa") if (f, i) != ("Gemma2", "sdpa")],
)
def test_eight_bits_are_close_and_fewer_bits_are_further_off(family, implementation):
    model, ids = make_model(family, implementation), make_ids()
    expected = logits_of(model, ids)
    error = {}
    for policy in ("int8", "int4", "int2", "kivi-4", "mustafar-50"):
        with simulate(model, policy):
            error[policy] = ((logits_of(model, ids) - expected).norm() / expected.norm()).item()
    # Steps of 8 bits are 17 times finer than those of 4; sharp softmaxes bend the proportion a little.
    assert 0 < error["int8"] < error["int4"] / 8 < 0.05
    assert error["int4"] < error["int2"]
    assert error["kivi-4"] > 0 and error["mustafar-50"] > 0
    assert torch.equal(logits_of(model, ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_model_is_restored_exactly(family, policy):
    model, ids = make_model(family), make_ids()
    expected, before = logits_of(model, ids), state_of(model)
    with simulate(model, policy):
        assert state_of(model) != before
        assert not torch.equal(logits_of(model, ids), expected)
    assert state_of(model) == before
    assert torch.equal(logits_of(model, ids), expected)


def test_the_model_is_restored_after_an_exception_inside():
    model, ids = make_model(), make_ids()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="mine"), simulate(model, "kivi-4+window3"):
        logits_of(model, ids)
        raise RuntimeError("mine")
    assert state_of(model) == before


def test_the_model_is_restored_when_installing_fails(monkeypatch):
    model = make_model()
    before = state_of(model)
    model.config._attn_implementation = "gone"
    monkeypatch.delattr(transformers.models.llama.modeling_llama, "eager_attention_forward")
    with pytest.raises(NotImplementedError, match="'gone'.*sdpa"), simulate(model, "kivi-4"):
        pass
    model.config._attn_implementation = "sdpa"
    assert state_of(model) == before


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_of_two_is_two_singles(policy):
    model, ids = make_model(), make_ids()
    with simulate(model, policy) as together:
        both = logits_of(model, ids)
    with simulate(model, policy) as apart:
        singles = torch.cat([logits_of(model, ids[:1]), logits_of(model, ids[1:])])
    torch.testing.assert_close(both, singles, rtol=1e-4, atol=1e-4)
    assert together.tally == apart.tally


def test_keys_before_rope_and_values_are_what_the_operators_make_of_the_projections(monkeypatch):
    model, ids = make_model(), make_ids()
    projected = {}
    layer = model.model.layers[0].self_attn
    for name in ("k_proj", "v_proj"):
        getattr(layer, name).register_forward_hook(lambda m, a, out, name=name: projected.update({name: out.clone()}))
    seen = record_attention(model, "sdpa", monkeypatch)
    with simulate(model, "int4+2%+sink"):
        logits_of(model, ids)
    options = {"outlier_fraction": 0.02, "protected_tokens": 1}
    key, _ = ops.simulate_uniform(projected["k_proj"], 4, axis="per_channel", **options)
    value, _ = ops.simulate_uniform(projected["v_proj"], 4, axis="per_token", **options)
    positions = torch.arange(ids.shape[1])[None]
    cos, sin = model.model.rotary_emb(key, positions)
    heads = key.view(2, -1, 2, 16).transpose(1, 2)
    _, rotated = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(heads, heads, cos, sin)
    assert torch.equal(seen[0][0], rotated)
    assert torch.equal(matrices(seen[0][1]), value)
    # The first token is a sink: bit for bit.
    assert torch.equal(value[:, 0], projected["v_proj"][:, 0])


@pytest.mark.parametrize("policy", ["kivi-2+sink4", "mustafar-70+sink4"])
def test_keys_after_rope_are_what_the_operators_make_of_the_cache(policy, monkeypatch):
    model, ids = make_model(), make_ids()
    seen = record_attention(model, "sdpa", monkeypatch)
    logits_of(model, ids)
    dense_key, dense_value = (matrices(x) for x in seen[0])
    with simulate(model, policy):
        logits_of(model, ids)
    key, value = (matrices(x) for x in seen[0])
    assert torch.equal(key, simulate_tensor(dense_key, policy, "key", head_dim=16))
    assert torch.equal(value, simulate_tensor(dense_value, policy, "value", head_dim=16))
    assert torch.equal(key[:, :4], dense_key[:, :4]) and not torch.equal(key[:, 4:], dense_key[:, 4:])


def test_bits_and_errors_are_those_of_all_layers_and_calls():
    model, ids = make_model(), make_ids()
    with simulate(model, "mustafar-50", measure_errors=True) as simulation:
        logits_of(model, ids)
        first = simulation.layer_errors
        logits_of(model, ids)
    assert simulation.tally == BitsTally(2 * 2 * 2 * 2 * 80 * 32, 9 * 2 * 2 * 2 * 2 * 80 * 32)
    assert [(e["layer"], e["kind"]) for e in first] == [(0, "key"), (0, "value"), (1, "key"), (1, "value")]
    assert all(0.01 < e["relative_error"] < 0.5 for e in first)
    assert simulation.layer_errors == first
    assert simulation.seconds > 0


def test_relative_error_is_squared_error_over_squared_norm():
    model, ids = make_model(), make_ids()
    keys = []
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda m, a, out: keys.append(out.clone()))
    with simulate(model, "k:int3,v:fp16", measure_errors=True) as simulation:
        logits_of(model, ids)
    out = simulate_tensor(keys[0], "int3", "key")
    expected = ((keys[0] - out).double() ** 2).sum() / (keys[0].double() ** 2).sum()
    assert [(e["layer"], e["kind"]) for e in simulation.layer_errors] == [(0, "key"), (1, "key")]
    assert simulation.layer_errors[1]["relative_error"] == pytest.approx(expected.item(), rel=1e-6)


def test_layers_may_differ(monkeypatch):
    model, ids = make_model(num_hidden_layers=3, head_dim=64), make_ids()
    seen = record_attention(model, "sdpa", monkeypatch)
    logits_of(model, ids)
    dense = {layer: [matrices(x) for x in pair] for layer, pair in seen.items()}
    # Layer 0 sees the same keys and values as without simulation, so that they can be compared.
    for policy in ("mustafar-70-q2+sink;layers1-2=kivi-4", "int4+sink;layers0=k:mustafar-50,v:kivi-2;layers2=fp16"):
        with simulate(model, policy, measure_errors=True) as simulation:
            logits_of(model, ids)
        for x, exact, kind in zip(seen[0], dense[0], ("key", "value"), strict=True):
            expected = simulate_tensor(exact, policy, kind, head_dim=64, layer=0)
            assert torch.equal(matrices(x), expected) and not torch.equal(expected, exact)
    # fp16 in layer 2: no error to record there, and its elements count 16 bits.
    assert [(e["layer"], e["kind"]) for e in simulation.layer_errors] == [
        (0, "key"),
        (0, "value"),
        (1, "key"),
        (1, "value"),
    ]
    elements = 2 * 80 * 2 * 64
    expected = BitsTally()
    for layer in (0, 1):
        for x, kind in zip(dense[layer], ("key", "value"), strict=True):
            simulate_tensor(x, simulation.policy, kind, head_dim=64, layer=layer, tally=expected)
    expected.add(2 * elements, 2 * 16 * elements)
    assert simulation.tally.elements == expected.elements
    # Bits of key tiles of layer 0 depend on values, which are those of the dense run there.
    assert simulation.tally == expected


@pytest.mark.parametrize("window", ["", "+window8"])
def test_a_layer_that_is_exact_sees_what_the_model_makes(window, monkeypatch):
    model, ids = make_model(), make_ids()
    seen = record_attention(model, "sdpa", monkeypatch)
    expected = logits_of(model, ids)
    dense = {layer: [x.clone() for x in pair] for layer, pair in seen.items()}
    with simulate(model, f"fp16{window};layers1=mustafar-50") as simulation:
        changed = logits_of(model, ids)
    assert torch.equal(seen[0][0], dense[0][0]) and torch.equal(seen[0][1], dense[0][1])
    assert not torch.equal(changed, expected) and 9 < simulation.tally.bits_per_element < 16
    assert torch.equal(logits_of(model, ids), expected)


def test_windows_and_layers_go_together():
    model, ids = make_model(), make_ids()
    with simulate(model, "int4+window8;layers0=int8") as simulation:
        both = logits_of(model, ids)
    with simulate(model, "k:int4+window8,v:int4+window8;layers0-1=int8"):
        eight = logits_of(model, ids)
    with simulate(model, "int8+window8"):
        assert torch.equal(logits_of(model, ids), eight)
    assert not torch.equal(both, eight) and simulation.tally.bits_per_element < 16


def test_models_that_share_a_configuration_do_not_disturb_each_other():
    model, ids = make_model(), make_ids()
    other = make_model()
    other.config = model.config
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = model.config
    expected = logits_of(other, ids)
    with simulate(model, "kivi-2"):
        assert torch.equal(logits_of(other, ids), expected)


def test_flash_functions_see_their_own_name_in_the_configuration(monkeypatch):
    model, ids = make_model(), make_ids()
    names = []

    def flash_like(module, *args, **kwargs):
        names.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_like", flash_like)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_like", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "flash_like"
    with simulate(model, "kivi-4"):
        logits_of(model, ids)
        assert model.config._attn_implementation == "kvpack_flash_like"
    assert names == ["flash_like"] * 2 and model.config._attn_implementation == "flash_like"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", ["int8+sink", "kivi-4", "mustafar-50+window8"])
def test_half_precision_models_work(policy, dtype):
    model, ids = make_model().to(dtype), make_ids()
    with simulate(model, policy):
        logits = logits_of(model, ids)
    assert logits.dtype == dtype and logits.isfinite().all()


def test_attention_errors_compare_what_attention_puts_out():
    model, ids = make_model(), make_ids()
    outputs: dict[str, list[torch.Tensor]] = {}
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda m, args: outputs.setdefault("all", []).append(args[0].clone()))
    logits_of(model, ids)
    dense = outputs["all"].pop()
    for policy in ("int3", "kivi-2", "k:mustafar-50,v:fp16", "int3+window16"):
        outputs["all"] = []
        with simulate(model, policy, measure_errors=True) as simulation:
            logits_of(model, ids)
        # Layer 0 sees the same queries with and without simulation, so the uncompressed model is its oracle.
        expected = ((dense - outputs["all"][-1]).double() ** 2).sum() / (dense.double() ** 2).sum()
        assert [e["layer"] for e in simulation.attention_errors] == [0, 1]
        assert simulation.attention_errors[0]["relative_error"] == pytest.approx(expected.item(), rel=1e-4)
    with simulate(model, "int3;layers0=fp16", measure_errors=True) as simulation:
        logits_of(model, ids)
    assert [e["layer"] for e in simulation.attention_errors] == [1]
    with simulate(model, "int3") as simulation:
        logits_of(model, ids)
    assert simulation.attention_errors == []
