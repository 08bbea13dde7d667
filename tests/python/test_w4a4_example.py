"""The example that puts W4A4 layers into a model: its matrices, its layers, and a run on a tiny model."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from saved_models import save_tiny_model, write_words

import kvpack

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "w4a4_model.py"
spec = importlib.util.spec_from_file_location("w4a4_model", EXAMPLE)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 32, 48, 64, 96])
def test_hadamard_matrices_are_orthogonal(order):
    matrix = example.hadamard(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2, 4, 12, 24, 32, 48, 64])
def test_hadamard_matrices_of_these_orders_are_flat(order):
    torch.testing.assert_close(example.hadamard(order).abs(), torch.full((order, order), order**-0.5).double())


def test_balance_makes_activations_and_weights_the_same():
    generator = torch.Generator().manual_seed(3)
    s, g = (torch.randn(12, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    s, g = s @ s.T, g @ g.T
    sides = [m / m.diagonal().mean() + example.DAMPING * torch.eye(12, dtype=torch.float64) for m in (s, g)]
    t = example.balance(s, g)
    torch.testing.assert_close(t @ sides[0] @ t, torch.linalg.inv(t) @ sides[1] @ torch.linalg.inv(t))


def test_a_replaced_layer_is_near_the_layer_and_comes_back():
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8))
    x = torch.randn(10, 64) * torch.exp2(torch.arange(64) % 5)
    expected, first = model(x), model[0]
    errors = {}
    with torch.no_grad():
        for name, sides in (
            ("none", lambda *_: None),
            ("hadamard", lambda _, one: example.hadamard_sides(one.in_features)),
        ):
            with example.replaced(model, sides):
                assert isinstance(model[0], example.W4A4Linear)
                errors[name] = ((model(x) - expected).norm() / expected.norm()).item()
            assert model[0] is first and torch.equal(model(x), expected)
    assert errors["hadamard"] < 0.25, errors


def test_weights_take_the_clip_ratio_of_the_smallest_error():
    weight = torch.randn(20, 64)
    chosen = kvpack.dequantize_int4(example.quantize_weight(weight))
    for clip_ratio in (1.0, 0.9, 0.8, 0.7):
        other = kvpack.dequantize_int4(kvpack.kron_quantize(weight, clip_ratio=clip_ratio))
        assert ((chosen - weight).square().sum(-1) <= (other - weight).square().sum(-1) + 1e-5).all()


def test_it_measures_a_tiny_model(tmp_path, monkeypatch, capsys):
    model = save_tiny_model(tmp_path / "model")
    text = write_words(tmp_path / "words.txt", 2000)
    flags = ["--text-file", str(text), "--seqlen", "64", "--segments", "2", "--calibrate", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["w4a4_model.py", "--model", str(model), *flags])
    assert example.main() in (0, 1)  # a model of random weights has nothing to gain
    printed = capsys.readouterr().out
    for name in ("as it is", "no transform", "hadamard", "calibrated"):
        assert name in printed
    assert "21 layers in W4A4" in printed
