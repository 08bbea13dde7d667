"""Recent windows inside a model: every query sees its own window dense and the rest simulated."""

import dataclasses

import pytest
import torch
from tiny_models import FAMILIES, logits_of, make_ids, make_model
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvpack import BitsTally, parse_policy, simulate, simulate_tensor
from kvpack.models import window as window_module
from kvpack.models.window import attend_with_window


@torch.no_grad()
def llama_by_query(model, ids, policy):
    """Logits of a Llama where each query's keys and values are put together by hand, one query after another."""
    inside = dataclasses.replace(policy, window=0)
    tokens = ids.shape[1]
    hidden = model.model.embed_tokens(ids)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(tokens)[None])

    def heads(x):
        return x.view(1, tokens, -1, 16).transpose(1, 2)

    def rotate(x):
        return apply_rotary_pos_emb(x, x, cos, sin)[0]

    for layer in model.model.layers:
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        query = rotate(heads(attention.q_proj(x)))
        key, value = attention.k_proj(x), attention.v_proj(x)
        dense = rotate(heads(key)), heads(value)
        if policy.key.stage == "pre_rope":
            far_key = rotate(heads(simulate_tensor(key, inside, "key", head_dim=16)))
        else:
            matrix = dense[0].transpose(1, 2).flatten(2)
            far_key = heads(simulate_tensor(matrix, inside, "key", head_dim=16))
        far = far_key, heads(simulate_tensor(value, inside, "value", head_dim=16))
        rows = []
        for t in range(tokens):
            near = max(0, t + 1 - policy.window)
            k, v = (
                torch.cat([f[:, :, :near], d[:, :, near : t + 1]], dim=2).repeat_interleave(2, dim=1)
                for f, d in zip(far, dense, strict=True)
            )
            weights = torch.softmax(query[:, :, t : t + 1] @ k.transpose(2, 3) / 4, dim=-1)
            rows.append((weights @ v).transpose(1, 2).flatten(2))
        hidden = hidden + attention.o_proj(torch.cat(rows, dim=1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


@pytest.mark.parametrize("policy", ["int2+window5", "kivi-2+window1", "mustafar-70+window7+sink2", "k:int2,v:fp16"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [64, 7])
def test_small_windows_equal_a_reference_made_query_by_query(policy, implementation, chunk, monkeypatch):
    monkeypatch.setattr(window_module, "_CHUNK_QUERIES", chunk)
    model, ids = make_model("Llama", implementation), make_ids(1, 50)
    expected = llama_by_query(model, ids, parse_policy(policy))
    with simulate(model, policy):
        logits = logits_of(model, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits, logits_of(model, ids), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["int2+window80", "kivi-2+window1000"])
def test_a_window_of_all_tokens_is_the_dense_model(family, policy):
    changes = {"sliding_window": 24} if family in ("Mistral", "Gemma2") else {}
    model, ids = make_model(family, **changes), make_ids()
    expected = logits_of(model, ids)
    with simulate(model, policy) as simulation:
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-3, atol=1e-3)
    assert simulation.tally.bits_per_element == 16.0


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("mask_kind", ["none", "bool", "added", "sliding"])
@pytest.mark.parametrize("window", [1, 4, 100])
def test_the_mixture_equals_eager_attention_query_by_query(softcap, mask_kind, window, monkeypatch):
    monkeypatch.setattr(window_module, "_CHUNK_QUERIES", 8)
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 6, 21, 8, generator=generator)
    near_k, near_v, far_k, far_v = (torch.randn(2, 2, 21, 8, generator=generator) for _ in range(4))
    module = torch.nn.Module()
    module.num_key_value_groups, module.head_dim = 3, 8
    rows, columns = torch.arange(21)[:, None], torch.arange(21)[None]
    sees = (columns <= rows) & (columns > rows - 6) if mask_kind == "sliding" else columns <= rows
    added = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None]
    given = {"none": None, "sliding": None, "bool": sees[None, None].expand(2, 1, 21, 21), "added": added}[mask_kind]
    out = attend_with_window(
        module,
        query,
        (far_k, far_v),
        (near_k, near_v),
        given,
        window=window,
        scaling=0.3,
        softcap=softcap,
        sliding_window=6 if mask_kind == "sliding" else None,
        position_ids=None,
    )
    for t in range(21):
        recent = ((columns[0] > t - window) & (columns[0] <= t))[:, None]
        k, v = torch.where(recent, near_k, far_k), torch.where(recent, near_v, far_v)
        expected, _ = eager_attention_forward(
            module, query[:, :, t : t + 1], k, v, added[:, :, t : t + 1], scaling=0.3, softcap=softcap
        )
        torch.testing.assert_close(out[:, t : t + 1], expected)


def test_bits_count_the_cache_as_it_is_after_the_last_token():
    model, ids = make_model(), make_ids()
    keys = []
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda m, a, out: keys.append(out))
    with simulate(model, "k:int4+sink+window8,v:fp16+sink+window8") as simulation:
        logits_of(model, ids)
    expected = BitsTally()
    simulate_tensor(keys[0], "int4+sink+window8", "key", tally=expected)
    assert simulation.tally.elements == 4 * expected.elements
    assert simulation.tally.bits == 2 * (expected.bits + 16 * expected.elements)


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "cu_seq_lens_q"])
def test_arguments_that_would_change_the_scores_are_refused(name):
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(NotImplementedError, match=name):
        attend_with_window(torch.nn.Module(), x, (x, x), (x, x), None, window=1, **{name: x})


def test_masks_that_are_no_tensor_are_refused():
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(NotImplementedError, match="4-D.*str.*sdpa"):
        attend_with_window(torch.nn.Module(), x, (x, x), (x, x), "block mask", window=1)
