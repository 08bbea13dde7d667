"""TileCache in transformers models: the same greedy tokens as simulation, and refusals where tiles could be wrong."""

import pytest
import torch
import transformers
from cuda_tensors import DEVICES
from tiny_models import make_ids, make_model

import kvpack
from kvpack import TileCache, attend_tiles
from kvpack.tile_batches import select_batches

POLICY = "mustafar-50-q4+window32"
SIZES = {"head_dim": 64, "max_position_embeddings": 1024}


def make(family="Llama", **changes):
    model = make_model(family, **{**SIZES, **changes})
    model.generation_config.eos_token_id = None  # every sequence gets all its tokens
    return model


def generate(model, ids, cache, tokens=24, **options):
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=tokens, do_sample=False,
            pad_token_id=0, **options,
        )  # fmt: skip


def both(model, ids, policy, **options):
    """Greedy text with tiles and with their simulation, and the two caches."""
    caches = TileCache(model, policy), TileCache(model, policy, simulate=True)
    with attend_tiles(model):
        out = generate(model, ids, caches[0], **options)
    return out, generate(model, ids, caches[1], **options), *caches


# --- equality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"])
@pytest.mark.parametrize("policy", ["mustafar-70+window32", "mustafar-50-q2+window32", "mustafar-30-q8+sink4"])
def test_greedy_tokens_with_tiles_equal_those_of_simulation(family, policy):
    changes = {"sliding_window": None} if family == "Mistral" else {}
    model, ids = make(family, **changes), make_ids(2, 150)
    tiles, simulated, cache, twin = both(model, ids, policy)
    assert torch.equal(tiles, simulated)
    assert cache.get_seq_length() == twin.get_seq_length() == 150 + 24 - 1
    assert cache.layers[0].past_tokens == twin.layers[0].past_tokens >= 128


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keys_values_and_layers_may_differ(implementation):
    policy = "k:mustafar-30-q8+window16+sink1,v:mustafar-70+window16+sink1;layers1=k:mustafar-0-q4,v:mustafar-50-q2"
    model = make(implementation=implementation)
    tiles, simulated, cache, _ = both(model, make_ids(1, 100), policy)
    assert torch.equal(tiles, simulated)
    assert [(layer.past[0].bits, layer.past[1].bits) for layer in cache.layers] == [(8, 16), (4, 2)]


def test_a_layer_with_fp16_stays_dense():
    model = make()
    tiles, simulated, cache, _ = both(model, make_ids(1, 100), POLICY + ";layers0=fp16")
    assert torch.equal(tiles, simulated)
    assert type(cache.layers[0]) is transformers.cache_utils.DynamicLayer
    assert cache.memory().compressed_elements == 2 * 2 * 64 * cache.layers[1].past_tokens


def test_logits_of_a_step_equal_simulation_closely():
    model, ids = make(), make_ids(2, 200)
    logits = []
    for simulate in (False, True):
        cache = TileCache(model, POLICY, simulate=simulate)
        with torch.no_grad(), attend_tiles(model):
            model(ids[:, :-1], past_key_values=cache)
            logits.append(model(ids[:, -1:], past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_pruning_nothing_at_16_bits_is_the_model_itself():
    model, ids = make(), make_ids(1, 150).clone()
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        expected = model(ids).logits[:, -1].float()
        cache = TileCache(model, "mustafar-0")
        with attend_tiles(model):
            model(ids[:, :-1], past_key_values=cache)
            actual = model(ids[:, -1:], past_key_values=cache).logits[:, -1].float()
    assert cache.layers[0].past_tokens == 128
    assert float((actual - expected).norm() / expected.norm()) < 0.05
    assert actual.argmax() == expected.argmax()


def test_a_sliding_layer_keeps_its_own_cache_and_the_others_soft_cap():
    model = make("Gemma2", sliding_window=24)
    tiles, simulated, cache, _ = both(model, make_ids(1, 150), POLICY, tokens=20)
    assert torch.equal(tiles, simulated)
    kinds = {type(layer).__name__ for layer in cache.layers}
    assert kinds == {"TileLayer", "DynamicSlidingWindowLayer"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("policy", [POLICY, "k:mustafar-50+window32,v:mustafar-70-q2+window32"])
def test_in_16_bits_every_step_is_close_to_simulation(policy, dtype, limit, device):
    model, ids = make().to(device, dtype), make_ids(2, 180).to(device)
    rows = []
    for simulate in (False, True):
        cache = TileCache(model, policy, simulate=simulate)
        with torch.no_grad(), attend_tiles(model):
            model(ids[:, :130], past_key_values=cache)  # 64 tokens are packed at once, 64 more on the way
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(130, 180)]
        rows.append(torch.cat(steps, 1).float())
        assert cache.layers[1].past_tokens == 128 and cache.layers[1].keys.device.type == device
    errors = (rows[0] - rows[1]).norm(dim=-1) / rows[1].norm(dim=-1)
    assert float(errors.max()) < limit


# --- what is held -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "past", "dense"), [(95, 0, 95), (96, 64, 32), (159, 64, 95), (160, 128, 32)])
def test_blocks_of_64_leave_the_window(prompt, past, dense):
    model = make()
    cache = TileCache(model, POLICY)
    with torch.no_grad(), attend_tiles(model):
        model(make_ids(1, prompt), past_key_values=cache)
    assert (cache.layers[0].past_tokens, cache.layers[0].dense_tokens) == (past, dense)
    assert cache.get_mask_sizes(3, 0) == (prompt + 3, 0)


def test_sink_tokens_stay_dense_in_front():
    model, ids = make(), make_ids(1, 200)
    cache, plain = TileCache(model, POLICY + "+sink4"), transformers.DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=plain)
        with attend_tiles(model):
            model(ids, past_key_values=cache)
    held, all_keys = cache.layers[1].keys, plain.layers[1].keys
    torch.testing.assert_close(held[:, :, :4], all_keys[:, :, :4])
    torch.testing.assert_close(held[:, :, 4:], all_keys[:, :, 4 + cache.layers[1].past_tokens :])


def test_memory_counts_tiles_window_and_what_dense_would_take():
    model = make()
    cache = TileCache(model, "mustafar-70-q2+window32")
    assert cache.memory().total_bytes == 0
    with torch.no_grad(), attend_tiles(model):
        model(make_ids(2, 544), past_key_values=cache)
    memory = cache.memory()
    per_token = 2 * 2 * 2 * 2 * 64  # layers, K and V, batch, kv_heads, head_dim
    assert memory.tokens == 544 and memory.compressed_elements == 512 * per_token
    assert memory.dense_bytes == 32 * per_token * 4 and memory.uncompressed_bytes == 544 * per_token * 4
    assert 3 < memory.compressed_bits_per_element < 4
    assert memory.compressed_bytes == sum(t.num_bytes for layer in cache.layers for t in layer.past)


def test_the_prompts_tensors_are_freed():
    model = make()
    cache = TileCache(model, POLICY)
    with torch.no_grad(), attend_tiles(model):
        model(make_ids(1, 544), past_key_values=cache)
    assert all(layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4 for layer in cache.layers)


# --- several tokens on a filled cache, batches, beams, crop ---------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 16, 33])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_several_new_tokens_attend_causally(chunk, implementation):
    model, ids = make(implementation=implementation), make_ids(2, 200 + chunk)
    logits = []
    for simulate in (False, True):
        cache = TileCache(model, POLICY, simulate=simulate)
        with torch.no_grad(), attend_tiles(model):
            model(ids[:, :200], past_key_values=cache)
            logits.append(model(ids[:, 200:], past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_beams_follow_their_sequences():
    tiles, simulated, _, _ = both(make(), make_ids(2, 150), POLICY, tokens=20, num_beams=3)
    assert torch.equal(tiles, simulated)


@pytest.mark.parametrize("bits", [16, 4])
def test_selected_rows_are_as_if_compressed_together(bits):
    x = torch.randn(3, 2, 128, 64).half()
    tiles = kvpack.compress_tile64(x, "key", sparsity=0.7, bits=bits)
    rows = [2, 0, 0, 1]
    expected, actual = kvpack.compress_tile64(x[rows], "key", sparsity=0.7, bits=bits), select_batches(tiles, rows)
    assert actual.leading == (4, 2)
    for one, other in zip(expected.tensors, actual.validate().tensors, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="row is 3; there are rows 0 to 2"):
        select_batches(tiles, [3])


def test_rows_can_be_repeated_and_selected():
    model, ids = make(), make_ids(2, 150)
    cache = TileCache(model, POLICY)
    with torch.no_grad(), attend_tiles(model):
        model(ids, past_key_values=cache)
        expected = model(ids[:, :1], past_key_values=cache).logits
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([1, 4]))
        assert cache.layers[0].keys.shape[0] == 2
        again = model(ids[:, :1], past_key_values=cache).logits
    assert again.shape == expected.shape
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.memory().total_bytes == 0


def test_crop_removes_dense_tokens_and_refuses_compressed_ones():
    model, ids = make(), make_ids(1, 170)
    cache = TileCache(model, POLICY)
    with torch.no_grad(), attend_tiles(model):
        model(ids, past_key_values=cache)
        expected = model(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        torch.testing.assert_close(model(ids[:, :1], past_key_values=cache).logits, expected)
    assert cache.get_seq_length() == 171
    with pytest.raises(NotImplementedError, match="60 tokens are to be removed, but only the 43 newest"):
        cache.crop(-60)
    with pytest.raises(ValueError, match="not 5"):
        cache.crop(5)


def test_prompt_lookup_decoding_writes_the_same_text():
    model, ids = make(), make_ids(1, 40).repeat(1, 4)
    cache = TileCache(model, POLICY)
    with attend_tiles(model):
        expected = generate(model, ids, TileCache(model, POLICY), tokens=30)
        assert torch.equal(generate(model, ids, cache, tokens=30, prompt_lookup_num_tokens=4), expected)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_padding_is_refused_with_its_reason_and_changes_nothing():
    model, ids = make(), make_ids(2, 150)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    cache = TileCache(model, POLICY)
    with (
        attend_tiles(model),
        pytest.raises(NotImplementedError, match="hides tokens in 1 of 2 sequences.*equal length"),
    ):
        model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_a_mask_that_is_not_causal_is_refused():
    model, ids = make(), make_ids(1, 150)
    cache = TileCache(model, POLICY)
    mask = torch.ones(1, 1, 1, 151, dtype=torch.bool)
    mask[..., 9] = False
    with torch.no_grad(), attend_tiles(model):
        model(ids, past_key_values=cache)
        with pytest.raises(
            NotImplementedError, match=r"\(1, 1, 1, 151\) is not the causal one of 1 queries and 151 keys"
        ):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_a_mask_that_was_causal_is_looked_at_again_when_it_or_the_cache_changes():
    model, ids = make(), make_ids(1, 151)
    mask = torch.ones(1, 1, 1, 151, dtype=torch.bool)
    with torch.no_grad(), attend_tiles(model):
        caches = [TileCache(model, POLICY) for _ in range(3)]
        for cache in caches:
            model(ids[:, :150], past_key_values=cache)
        model(ids[:, :1], attention_mask=mask, past_key_values=caches[0])
        model(ids[:, :1], attention_mask=mask, past_key_values=caches[1])
        with pytest.raises(NotImplementedError, match=r"\(1, 1, 1, 151\) is not the causal one of 1 queries and 152"):
            model(ids[:, :1], attention_mask=mask, past_key_values=caches[1])
        mask[..., 9] = False
        with pytest.raises(NotImplementedError, match="not the causal one of 1 queries and 151"):
            model(ids[:, :1], attention_mask=mask, past_key_values=caches[2])


def test_tiles_outside_the_context_and_the_context_without_tiles_are_refused():
    model, ids = make(), make_ids(1, 100)
    with pytest.raises(RuntimeError, match="attend_tiles"):
        model(ids, past_key_values=TileCache(model, POLICY))
    with attend_tiles(model):
        with pytest.raises(NotImplementedError, match="TileCache"):
            model(ids, past_key_values=transformers.DynamicCache())
        with pytest.raises(RuntimeError, match="that model"):
            model(ids, past_key_values=TileCache(make(), POLICY))
    model(ids)  # as before


def test_two_contexts_on_one_model_are_refused():
    model = make()
    with attend_tiles(model):
        with pytest.raises(ValueError, match="already"), attend_tiles(model):
            pass
        with pytest.raises(ValueError, match="already"), kvpack.simulate(model, "mustafar-50"):
            pass
    implementation = model.config._attn_implementation
    assert not implementation.startswith("kvpack_")


def test_gradients_and_other_methods_and_head_sizes_are_refused():
    model, ids = make(), make_ids(1, 150)
    cache = TileCache(model, POLICY)
    with attend_tiles(model), pytest.raises(NotImplementedError, match="gradients"):
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="layer 0 has policy 'int4'"):
        TileCache(model, "int4")
    with pytest.raises(NotImplementedError, match="head_dim 16; tiles exist for 64, 128, 256"):
        TileCache(make(head_dim=16), POLICY)
    with pytest.raises(NotImplementedError, match="sliding window: nothing"):
        TileCache(make("Mistral", sliding_window=32), POLICY)
    with pytest.raises(ValueError, match="layers9"):
        TileCache(model, POLICY + ";layers9=fp16")


def test_other_shapes_than_before_are_refused_and_change_nothing():
    model = make()
    cache = TileCache(model, POLICY)
    with torch.no_grad(), attend_tiles(model):
        model(make_ids(2, 100), past_key_values=cache)
        with pytest.raises(ValueError, match=r"\(2, 2, 36, 64\).*\(1, 2, 1, 64\)"):
            model(make_ids(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == 100


def test_float32_values_beyond_16_bits_are_refused():
    layer_cache = TileCache(make(), "mustafar-50+window0", simulate=True)
    x = torch.randn(1, 2, 64, 64)
    x[0, 1, 3, 2] = 7e4
    with pytest.raises(ValueError, match="layer 1 keys: 70000.0 does not fit a 16-bit float"):
        layer_cache.update(x, x, 1)
