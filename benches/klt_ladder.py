#!/usr/bin/env python3
"""Which changes to klt's calibration pay: every variant fitted to the same keys, values and gradients, on one GPU.

    python benches/klt_ladder.py MODEL wiki.test.raw --device cuda --variants base,tokens,labels --json out/ladder.json

TEXT calibrates in its first quarter and is measured after it. Codebooks are fitted by Lloyd's rounds and simulated by
torch, all on the device, so that a variant takes seconds; figures of the product are klt_quality.py's. Per variant and
budget: rise of perplexity and KL divergence, for samples of the text itself ("own") and of other text ("foreign").
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import klt_quality
import numpy as np
import torch

import kvpack
from kvpack import ops
from kvpack.calibrate import KltCalibration
from kvpack.calibrate.base import KINDS
from kvpack.calibrate.collect import Collector
from kvpack.calibrate.fingerprint import ModelFingerprint
from kvpack.calibrate.klt_calibration import GRID_LEVELS, LEVELS, KltBlocks, LayerKlt
from kvpack.calibrate.samples import choose_samples
from kvpack.evaluate import texts
from kvpack.models import load
from kvpack.policy import parse_policy

ROUNDS = 40


@dataclass(frozen=True)
class Variant:
    """One way to fit.

    Attributes:
        samples: of 2048 tokens.
        by_r: codebooks weigh a token by its r squared.
        token_limit: tokens weigh by their gradients, at most so many times the mean; 0: all alike.
        weigh_covariance: so do they in mean and covariance.
        shrinkage: of the Fisher matrix.
        labels: gradients of the text's tokens, of tokens that the model draws, or of both.
        share: of the largest variance, from which on a coefficient is part of r.
        spread: noise of so much of the mean weighted variance is added to every coefficient, so that none looks still.
        rounds: levels are shared out again after each layer's keys and values were measured alone, so many times.
    """

    samples: int = 16
    by_r: bool = True
    token_limit: float = 0.0
    weigh_covariance: bool = False
    shrinkage: float = 0.0
    labels: str = "text"
    share: float = 0.02
    spread: float = 0.0
    rounds: int = 0


VARIANTS = {
    "base": Variant(),
    "plain-codebooks": Variant(by_r=False),
    "tokens": Variant(token_limit=20.0),
    "tokens-5": Variant(token_limit=5.0),
    "tokens-100": Variant(token_limit=100.0),
    "tokens-covariance": Variant(token_limit=20.0, weigh_covariance=True),
    "labels": Variant(labels="model"),
    "both-labels": Variant(labels="both"),
    "shrunk-0.1": Variant(shrinkage=0.1),
    "shrunk-0.3": Variant(shrinkage=0.3),
    "samples-32": Variant(samples=32),
    "share-0.2": Variant(share=0.2),
    "share-0.002": Variant(share=0.002),
    "measured": Variant(rounds=1),
    "tokens-32": Variant(token_limit=20.0, samples=32),
    "tokens-both-32": Variant(token_limit=20.0, samples=32, labels="both"),
    "tokens-shrunk-0.1": Variant(token_limit=20.0, shrinkage=0.1),
    "tokens-shrunk-0.3": Variant(token_limit=20.0, shrinkage=0.3),
    "tokens-spread-0.003": Variant(token_limit=20.0, spread=0.003),
    "tokens-spread-0.01": Variant(token_limit=20.0, spread=0.01),
    "tokens-spread-0.03": Variant(token_limit=20.0, spread=0.03),
    "tokens-shrunk-spread": Variant(token_limit=20.0, shrinkage=0.2, spread=0.01),
}

Rows = dict[tuple[int, str], torch.Tensor]


def main() -> None:
    """Fits and measures every variant, printing as it goes."""
    options = read_arguments()
    bench = Bench(options)
    found = []
    for name in options.variants.split(","):
        for origin in options.origins.split(","):
            started = time.perf_counter()
            entry = {"variant": name, "origin": origin} | bench.measure(VARIANTS[name], origin)
            found.append(entry | {"seconds": round(time.perf_counter() - started, 1)})
            print(json.dumps(found[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--origins", default="own,foreign", help="own: TEXT; foreign: --foreign; mixed: both")
    parser.add_argument("--foreign", default="pydoc", help="names of texts, with + between")
    parser.add_argument("--budgets", default="2.4,3.4,2")
    parser.add_argument("--segments", type=int, default=48)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Bench:
    """The model, what it says of the text, and samples that were collected already."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        files = load.open_model(options.model)
        self.tokenizer = load.load_tokenizer(files)
        device = load.choose_device(options.device)
        self.model = load.load_weights(files, self.tokenizer, dtype="float32", device=device).model
        self.device = next(self.model.parameters()).device
        self.fingerprint = ModelFingerprint.of(self.model)
        self.own = texts.read_text_file(options.text)
        tokens = texts.tokenize(self.own, self.tokenizer)
        cut = texts.cut_segments("text", tokens[len(tokens) // 4 :], options.seqlen, options.segments)
        self.segments = torch.from_numpy(cut).to(self.device)
        self.reference = [self.logits(segment) for segment in self.segments]
        self.nll = [self.compare(index, logits)[1] for index, logits in enumerate(self.reference)]
        self.collected: dict[tuple[str, int, bool], tuple[Rows, Rows]] = {}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Predictions for all tokens but the first."""
        with torch.inference_mode():
            return self.model(input_ids=tokens[None], use_cache=False).logits[0, :-1]

    def compare(self, segment: int, logits: torch.Tensor) -> tuple[float, float]:
        """Mean KL divergence and cross-entropy of one segment."""
        found = ops.compare_logits(self.reference[segment], logits, self.segments[segment][1:].contiguous())
        return float(np.mean(found.kl)), float(np.mean(found.nll))

    def measure(self, variant: Variant, origin: str) -> dict[str, Any]:
        """Rise and KL of one variant at every budget."""
        states, gradients = self.collect(origin, variant)
        calibration = self.fit(states, gradients, variant)
        found: dict[str, Any] = {}
        for budget in self.options.budgets.split(","):
            policy = f"klt-{budget}+sink"
            current = calibration
            for _ in range(variant.rounds):
                current = self.rescaled(current, policy)
            with torch_simulation():
                kl, nll, bits = self.score(policy, current)
            rise = float(np.exp(np.mean(nll)) - np.exp(np.mean(self.nll)))
            found[budget] = {"rise": round(rise, 4), "kl": round(float(np.mean(kl)), 6), "bits": round(bits, 4)}
        return found

    def score(self, policy: str, calibration: KltCalibration, segments: int | None = None) -> tuple[list, list, float]:
        """KL and cross-entropy of every segment, and the bits."""
        found = []
        with kvpack.simulate(self.model, policy, calibration=calibration) as simulation:
            for index, segment in enumerate(self.segments[:segments]):
                found.append(self.compare(index, self.logits(segment)))
        kl, nll = zip(*found, strict=True)
        return list(kl), list(nll), simulation.tally.bits_per_element

    def collect(self, origin: str, variant: Variant) -> tuple[Rows, Rows]:
        """Keys and values, and their gradients; both labels stand one after the other."""
        if variant.labels == "both":
            parts = [self.collect(origin, replace(variant, labels=labels)) for labels in ("text", "model")]
            return parts[0][0], {key: torch.cat([part[1][key] for part in parts]) for key in parts[0][1]}
        key = (origin, variant.samples, variant.labels == "model")
        if key not in self.collected:
            self.collected[key] = self._collect(origin, variant.samples, drawn=variant.labels == "model")
        return self.collected[key]

    def _collect(self, origin: str, count: int, *, drawn: bool) -> tuple[Rows, Rows]:
        foreign = [texts.load_text(name) for name in self.options.foreign.split("+")]
        sources = {"own": [self.own], "foreign": foreign, "mixed": [self.own, *foreign]}[origin]
        found: dict[str, dict[tuple[int, str], list[torch.Tensor]]] = {"states": {}, "gradients": {}}

        def write(layer: int, kind: str, what: str, rows: torch.Tensor) -> None:
            found[what].setdefault((layer, kind), []).append(rows.clone())

        with Collector(self.model, "fisher", sink=1, seed=0) as collector, labels_of_model(drawn=drawn):
            for number, text in enumerate(sources):
                tokens = texts.tokenize(text, self.tokenizer)
                each = max(1, count // len(sources)) if origin != "mixed" else count
                seqlen = self.options.seqlen
                chosen = choose_samples(text.name, tokens, each, seqlen, (0, number), whole_text=False)
                for index, sample in enumerate(chosen.tokens):
                    collector.run(torch.from_numpy(sample).to(self.device), index, write)
        states, gradients = (
            {key: torch.cat(rows) for key, rows in found[what].items()} for what in ("states", "gradients")
        )
        return states, gradients

    def fit(self, states: Rows, gradients: Rows, variant: Variant) -> KltCalibration:
        """A calibration with blocks of all heads, without grids."""
        parts = {}
        for layer in range(self.fingerprint.num_layers):
            for kind in KINDS:
                parts[layer, kind] = fit_part(states[layer, kind], gradients[layer, kind], variant, self.fingerprint)
        header = {"model": self.fingerprint.to_json(), "blocks": [self.fingerprint.kv_heads]}
        return KltCalibration(header, parts, "ladder")  # type: ignore[arg-type]

    def rescaled(self, calibration: KltCalibration, policy: str) -> KltCalibration:
        """Distortions times what a part costs when it alone is compressed, over what its distortions promise."""
        parsed = parse_policy(policy)
        expected = {key: chosen_distortion(calibration, parsed, key) for key in calibration.parts}
        parts = {}
        for layer, kind in calibration.parts:
            alone = {"key": "fp16+sink", "value": "fp16+sink", kind: policy}
            rest = "" if layer == 0 else f"layers0-{layer - 1}=fp16"
            last = self.fingerprint.num_layers - 1
            rest += "" if layer == last else f"{';' if rest else ''}layers{layer + 1}-{last}=fp16"
            only = f"k:{alone['key']},v:{alone['value']}" + (f";{rest}" if rest else "")
            with torch_simulation(), codecs_of(calibration, parsed):
                kl, _, _ = self.score(only, calibration, segments=4)
            ratio = max(0.2, min(5.0, float(np.mean(kl)) / max(expected[layer, kind], 1e-12)))
            part = calibration.parts[layer, kind]
            (heads, blocks), *_ = part.blocks.items()
            parts[layer, kind] = replace(part, blocks={heads: replace(blocks, distortions=blocks.distortions * ratio)})
        return KltCalibration(calibration.header, parts, "ladder")


def chosen_distortion(calibration: KltCalibration, policy: Any, key: tuple[int, Any]) -> float:
    """The loss that a part promises with the levels a policy gives it."""
    from kvpack.klt_methods import choices_of
    from kvpack.klt_tables import find_codecs

    levels = find_codecs(calibration, choices_of(policy, calibration))[key].levels
    (blocks,) = calibration.parts[key].blocks.values()
    return float(sum(blocks.distortions[row, LEVELS.index(count)] for row, count in enumerate(levels.tolist())))


def fit_part(x: torch.Tensor, g: torch.Tensor, variant: Variant, fingerprint: ModelFingerprint) -> LayerKlt:
    """kvpack.calibrate.klt_fit with the changes of a variant."""
    from kvpack.calibrate import klt_fit

    x, g = x.double(), g.double()
    fisher = g.T @ g / len(g)
    importance = fisher.diagonal().clone()
    fisher = (1 - variant.shrinkage) * fisher + variant.shrinkage * torch.diag(importance)
    weights = torch.ones(len(x), dtype=torch.float64, device=x.device)
    if variant.token_limit:
        weights = klt_fit.token_weights(g[: len(x)], fisher, variant.token_limit)
    counted = weights if variant.weigh_covariance else torch.ones_like(weights)
    mean = (counted[:, None] * x).sum(0) / counted.sum()
    covariance = (counted[:, None] * (x - mean)).T @ (x - mean) / counted.sum()
    basis, variances = (each.to(x.device) for each in klt_fit.decorrelate(covariance.cpu(), fisher.cpu()))
    noise = variant.spread * float(variances.mean())
    variances = variances + noise
    basis = basis.float()
    y = (x - mean) @ basis.double()
    y += torch.randn(y.shape, device=y.device, generator=torch.Generator(y.device).manual_seed(0)) * noise**0.5
    z = y / variances.sqrt()
    in_scale = variances >= variant.share * variances.max()
    r = klt_fit.round_scale(z[:, in_scale].square().mean(dim=1, keepdim=True).sqrt())
    squares = r.square()[:, 0] * weights
    centroids, errors = fit_codebooks(z / r, squares if variant.by_r else weights)
    blocks = KltBlocks(
        basis=basis[None].cpu().numpy(),
        variances=variances.float().cpu().numpy(),
        codebooks=centroids,
        distortions=errors * (0.5 * variances * squares.mean()).cpu().numpy()[:, None],
        grids=np.ones((len(mean), len(GRID_LEVELS), 2), np.float32),
        grid_distortions=np.zeros((len(mean), len(GRID_LEVELS))),
    )
    numbers = (each.float().cpu().numpy() for each in (mean, covariance.diagonal(), importance))
    return LayerKlt(*numbers, {fingerprint.kv_heads: blocks})


def fit_codebooks(z: torch.Tensor, weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's rounds for all coefficients and numbers of levels; sums of sorted samples make a round a search."""
    ordered, places = z.T.contiguous().sort(dim=1)
    mass = weights[places]
    zero = torch.zeros(len(ordered), 1, dtype=torch.float64, device=z.device)
    masses, sums = (torch.cat((zero, each.cumsum(dim=1)), dim=1) for each in (mass, mass * ordered))
    square = (mass * ordered * ordered).sum(dim=1)
    centroids, errors = [], []
    for levels in LEVELS:
        quantiles = (torch.arange(levels, dtype=torch.float64, device=z.device) + 0.5) / levels * masses[0, -1]
        first = torch.searchsorted(masses, quantiles.expand(len(ordered), -1).contiguous()).clamp(max=z.shape[0]) - 1
        c = ordered.gather(1, first.clamp(min=0))
        for _ in range(ROUNDS):
            inner = torch.searchsorted(ordered, ((c[:, 1:] + c[:, :-1]) / 2).contiguous())
            ends = torch.cat((zero.long(), inner, torch.full_like(zero, z.shape[0]).long()), dim=1)
            inside = masses.gather(1, ends[:, 1:]) - masses.gather(1, ends[:, :-1])
            total = sums.gather(1, ends[:, 1:]) - sums.gather(1, ends[:, :-1])
            c = torch.where(inside > 0, total / inside.clamp(min=1e-30), c)
        errors.append(((square - (inside * c * c).sum(dim=1)) / masses[:, -1]).clamp(min=0))
        step = torch.arange(levels, device=z.device) * 1e-6
        centroids.append((c.sort(dim=1).values + step).float())
    return torch.cat(centroids, dim=1).cpu().numpy(), torch.stack(errors, dim=1).cpu().numpy()


@contextmanager
def torch_simulation() -> Iterator[None]:
    """Simulates klt by torch, on whatever device."""
    import kvpack.klt

    before = kvpack.klt.simulate_klt
    klt_quality.replace_simulation()
    try:
        yield
    finally:
        kvpack.klt.simulate_klt = before


@contextmanager
def codecs_of(calibration: KltCalibration, policy: Any) -> Iterator[None]:
    """Parts get the levels they have in a policy as a whole, also where a policy of some parts alone is simulated."""
    from kvpack import klt_methods, klt_tables

    codecs = klt_tables.find_codecs(calibration, klt_methods.choices_of(policy, calibration))
    before = klt_methods.find_codecs
    klt_methods.find_codecs = lambda *_: codecs
    try:
        yield
    finally:
        klt_methods.find_codecs = before


@contextmanager
def labels_of_model(*, drawn: bool) -> Iterator[None]:
    """The loss is that of tokens the model draws itself: gradients then make the Fisher matrix of its predictions."""
    before = torch.nn.functional.cross_entropy

    def loss(logits: torch.Tensor, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        own = torch.distributions.Categorical(logits=logits.detach()).sample()
        return before(logits, own if drawn else tokens, **options)

    torch.manual_seed(0)
    torch.nn.functional.cross_entropy = loss  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.cross_entropy = before


if __name__ == "__main__":
    main()
