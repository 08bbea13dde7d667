"""What calibration takes from a model: keys before RoPE, values, gradients, query weights; and which model it is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, make_ids, make_model

from kvpack.calibrate.collect import CollectError, Collector, value_weights
from kvpack.calibrate.fingerprint import ModelFingerprint
from kvpack.models.layers import find_attention_layers

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = ("none", "query", "fisher")


def collect(model: torch.nn.Module, weights: str, ids: torch.Tensor, sink: int = 0, seed: int = 0) -> dict:
    """(layer, kind, what) -> rows of one sample."""
    found: dict = {}

    def write(layer: int, kind: str, what: str, rows: torch.Tensor) -> None:
        assert (layer, kind, what) not in found
        found[layer, kind, what] = rows.clone()

    with Collector(model, weights, sink=sink, seed=seed) as collector:
        collector.run(ids, 0, write)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_keys_before_rope_and_values_are_those_of_the_projections(family: str, weights: str) -> None:
    model, ids = make_model(family), make_ids(1, 30)[0]
    outputs = {}
    hooks = [
        getattr(layer.module, name).register_forward_hook(
            lambda module, args, output, key=(layer.index, kind): outputs.update({key: output.detach()[0]})
        )
        for layer in find_attention_layers(model)
        for kind, name in (("key", "k_proj"), ("value", "v_proj"))
    ]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    found = collect(model, weights, ids, sink=2)
    for (layer, kind), output in outputs.items():
        torch.testing.assert_close(found[layer, kind, "states"], output[2:], rtol=0, atol=1e-5)
    assert all(rows.shape[0] in (28, 1) for rows in found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_summed_loss(family: str) -> None:
    model, ids = make_model(family), make_ids(1, 20)[0]
    found = collect(model, "fisher", ids)
    layer = find_attention_layers(model)[1]

    def loss_with(change: torch.Tensor, name: str) -> float:
        hook = getattr(layer.module, name).register_forward_hook(lambda module, args, output: output + change)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].double()
        hook.remove()
        return float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))

    # Norms compute in float32 whatever the model's type, so steps must be wide.
    model = model.double()
    for kind, name in (("key", "k_proj"), ("value", "v_proj")):
        gradient = found[1, kind, "gradients"]
        step = torch.zeros(1, 20, gradient.shape[1], dtype=torch.float64)
        for place in gradient.abs().flatten().topk(3).indices.tolist():
            token, channel = divmod(place, gradient.shape[1])
            step.zero_()[0, token, channel] = 1e-3
            slope = (loss_with(step, name) - loss_with(-step, name)) / 2e-3
            assert slope == pytest.approx(float(gradient[token, channel]), rel=0.02)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_model_is_left_as_it_was(weights: str) -> None:
    model, ids = make_model("Llama"), make_ids(1, 20)[0]
    with torch.no_grad():
        before = model(ids[None]).logits
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    collect(model, weights, ids)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids[None]).logits, before)


def test_query_weights_are_squared_queries_turned_back_by_the_rotation_of_their_key() -> None:
    model, ids = make_model("Llama", head_dim=8), make_ids(1, 40)[0]
    layer = find_attention_layers(model)[0]
    rotary = model.model.rotary_emb
    hidden: dict = {}
    layer.module.register_forward_pre_hook(
        lambda m, args, kwargs: hidden.update(x=kwargs["hidden_states"]), with_kwargs=True
    )
    drawn: list = []

    class Watching(Collector):
        def draw_queries(self, layer: int, tokens: int, window: int | None) -> np.ndarray:
            drawn.append(super().draw_queries(layer, tokens, window))
            return drawn[-1]

    found: dict = {}
    with Watching(model, "query", sink=1, seed=3) as collector:
        collector.run(ids, 0, lambda layer, kind, what, rows: found.update({(layer, kind, what): rows.clone()}))
    assert (drawn[0] >= np.arange(40)).all() and drawn[0].max() < 40 and (drawn[0] != drawn[1]).any()
    with torch.no_grad():
        query = layer.module.q_proj(hidden["x"]).view(40, 4, 8).transpose(0, 1).double()
        cos, sin = (part[0].double() for part in rotary(hidden["x"], torch.arange(40)[None]))

        def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

        turned = turn(turn(query, cos, sin)[:, torch.from_numpy(drawn[0])], cos, -sin)[:, 1:]
    expected = turned.square().sum(dim=1).view(2, 2, 8).sum(dim=1).flatten()
    torch.testing.assert_close(found[0, "key", "squares"][0], expected, rtol=1e-4, atol=1e-6)


def test_queries_stay_inside_a_sliding_window() -> None:
    with Collector(make_model("Llama"), "query", sink=0, seed=0) as collector:
        drawn = collector.draw_queries(0, 500, 7)
    ahead = drawn - np.arange(500)
    assert ahead.min() == 0 and ahead.max() == 6 and drawn.max() < 500


def test_value_weights_are_the_columns_that_read_a_channel() -> None:
    layer = find_attention_layers(make_model("Llama"))[0]
    columns = layer.module.o_proj.weight.detach().double()
    weights = value_weights(layer)
    for head, channel in itertools.product(range(2), range(16)):
        read_by = [(2 * head + member) * 16 + channel for member in range(2)]
        assert float(weights[16 * head + channel]) == pytest.approx(float(columns[:, read_by].square().sum()))


def test_values_that_are_not_finite_name_their_layer() -> None:
    model = make_model("Llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = float("nan")
    with pytest.raises(CollectError, match="layer 1 values: states of sample 0 are not finite in torch.float32"):
        collect(model, "none", make_ids(1, 10)[0])
    with torch.no_grad():
        model(make_ids(1, 10))  # no hook is left behind


def test_a_fingerprint_survives_types_and_tells_weights_apart() -> None:
    found = {
        str(dtype): ModelFingerprint.of(make_model("Llama").to(dtype)) for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(set(found.values())) == 1
    (fingerprint,) = set(found.values())
    assert (fingerprint.num_layers, fingerprint.kv_heads, fingerprint.head_dim) == (2, 2, 16)
    changed = make_model("Llama")
    with torch.no_grad():
        changed.model.layers[1].self_attn.v_proj.weight[3, 5] *= -1
    assert ModelFingerprint.of(changed) != fingerprint
