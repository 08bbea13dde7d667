"""What simulation inside a model refuses: models, layers, caches and masks it would get wrong, and gradients."""

import copy

import pytest
import torch
import transformers
from tiny_models import logits_of, make_ids, make_model
from torch import nn

from kvpack import simulate


def test_layers_and_heads_that_the_model_lacks_are_refused_before_a_forward():
    model = make_model()
    with pytest.raises(ValueError, match="layers1-2=int8.*LlamaForCausalLM lacks: it has 2 layers, 0 to 1"):
        simulate(model, "int4;layers1-2=int8")
    with pytest.raises(ValueError, match="layers7=fp16"):
        simulate(model, "fp16;layers7=fp16")
    for policy in ("mustafar-50-q4", "int4;layers1=mustafar-50-q4"):
        with pytest.raises(NotImplementedError, match="mustafar-50-q4 exists for head_dim 64, 128, 256, not for 16"):
            simulate(model, policy)
    simulate(model, "fp16")


@pytest.mark.parametrize("policy", ["int4", "kivi-2", "mustafar-50", "mustafar-50+window4"])
@pytest.mark.parametrize(("kind", "projection"), [("key", "k_proj"), ("value", "v_proj")])
def test_nan_names_the_layer_and_the_kind(policy, kind, projection):
    model, ids = make_model(), make_ids()
    getattr(model.model.layers[1].self_attn, projection).weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=f"layer 1 {kind}s: .*nan"), simulate(model, policy):
        logits_of(model, ids)


def test_a_model_under_simulation_is_not_simulated_again():
    model, ids = make_model(), make_ids()
    expected = logits_of(model, ids)
    with simulate(model, "int4"):
        for inner in (model, model.model):
            with pytest.raises(ValueError, match="'int4' already.*'int8\\+sink'"), simulate(inner, "int8+sink"):
                pass
        with pytest.raises(ValueError, match="already"), simulate(model, "fp16"):
            pass
    assert torch.equal(logits_of(model, ids), expected)
    with simulate(model, "int4"), simulate(copy.deepcopy(model), "int8"):
        pass


@pytest.mark.parametrize("policy", ["int4", "kivi-4", "int4+window8"])
def test_a_cache_that_holds_tokens_is_refused(policy):
    model, ids = make_model(), make_ids()
    with torch.no_grad():
        past = model(ids[:, :40], use_cache=True).past_key_values
        with pytest.raises(NotImplementedError, match="40 tokens already.*whole sequences"), simulate(model, policy):
            model(ids[:, 40:], past_key_values=past)
        with pytest.raises(NotImplementedError, match="whole sequences"), simulate(model, policy):
            model.generate(ids, max_new_tokens=3, do_sample=False)
        with simulate(model, policy):
            model(ids, use_cache=True)
    static = transformers.StaticCache(config=model.config, max_cache_len=128)
    if policy != "int4":
        with pytest.raises(NotImplementedError, match="80 queries and 128 keys"), simulate(model, policy):
            logits_of(model, ids, past_key_values=static)


@pytest.mark.parametrize("policy", ["int4", "kivi-4"])
def test_padding_packing_and_prepared_masks_are_refused(policy):
    model, ids = make_model(), make_ids()
    mask = torch.ones_like(ids)
    with simulate(model, policy):
        with_mask = logits_of(model, ids, attention_mask=mask)
        assert torch.equal(with_mask, logits_of(model, ids))
        mask[1, :3] = 0
        with pytest.raises(NotImplementedError, match="1 of 2 sequences .padding."):
            logits_of(model, ids, attention_mask=mask)
        with pytest.raises(NotImplementedError, match="padding"), torch.no_grad():
            model.model(ids, mask)
        with pytest.raises(NotImplementedError, match=r"\(2, 1, 80, 80\)"):
            logits_of(model, ids, attention_mask=torch.zeros(2, 1, 80, 80))
        positions = torch.cat([torch.arange(40), torch.arange(40)])[None]
        with pytest.raises(NotImplementedError, match="packed"):
            logits_of(model, ids, position_ids=positions)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "1 x GPT2Attention: has no k_proj and no v_proj.*Llama"),
        ("Phi3", {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}, "2 x Phi3Attention: has no"),
        ("GPTNeoX", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, "GPTNeoXAttention"),
        ("Mamba", {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}, "no attention modules"),
    ],
)
def test_models_without_separate_projections_are_refused_with_what_exists(name, sizes, words):
    config = getattr(transformers, f"{name}Config")(vocab_size=97, pad_token_id=0, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(NotImplementedError, match=words):
        simulate(model, "int4")


def test_encoder_decoders_shared_layers_and_other_things_are_refused():
    bart = transformers.BartConfig(
        vocab_size=97,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        simulate(transformers.BartForConditionalGeneration(bart), "int4")
    model = make_model()
    model.model.layers[1].self_attn.is_kv_shared_layer = True
    with pytest.raises(NotImplementedError, match="1 x LlamaAttention: shares the keys"):
        simulate(model, "int4")
    with pytest.raises(TypeError, match="str"):
        simulate("llama", "int4")
    with pytest.raises(ValueError, match="int6"):
        simulate(make_model(), "int6")


def test_a_layer_that_goes_around_its_projection_is_not_taken_for_simulated():
    model, ids = make_model(), make_ids()
    attention = model.model.layers[1].self_attn
    projection = attention.k_proj
    attention.k_proj = nn.Identity()
    attention.k_proj.forward = projection.forward
    attention.k_proj.__class__ = type("Untouched", (nn.Identity,), {"__call__": lambda self, x: projection(x)})
    with pytest.raises(NotImplementedError, match="layer 1 .LlamaAttention. does not use"), simulate(model, "int4"):
        logits_of(model, ids)


def test_a_backward_pass_through_simulated_keys_is_refused():
    model, ids = make_model(), make_ids()
    with simulate(model, "int4"):
        logits = model(ids).logits
    with pytest.raises(NotImplementedError, match="no gradient"):
        logits.sum().backward()
