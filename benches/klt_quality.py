#!/usr/bin/env python3
"""What klt costs in quality, against KVQuant's method: own, foreign and mixed calibrations, several kinds of text.

    python benches/klt_quality.py MODEL wiki.test.raw out/klt-quality --device cuda --stages baselines,own,foreign,mixed

TEXT calibrates in its first quarter; the segments after it are measured. A stage that is done is not done again, so a
lease of a machine can be spent in several calls. Tables stand in FOLDER/table.md, every segment in FOLDER/*.json.
--simulate-in-torch takes torch's arithmetic in the place of kvpack's, for GPUs that kvpack has no kernel for yet: the
same rule with other rounding, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.calibrate import Request as CalibrationRequest
from kvpack.calibrate import draw
from kvpack.calibrate import prepare as prepare_calibration
from kvpack.calibrate import run as run_calibration
from kvpack.evaluate import Request, prepare, run
from kvpack.evaluate.bootstrap import paired_interval, perplexity
from kvpack.evaluate.texts import TextError, load_text

TEXT = "TEXT"
"""Stands for the text of the command line."""
CODEBOOKS = ("nuq4+1%+sink", "nuq3+1%+sink", "nuq2+1%+sink")
APART = ("klt-3.4+sink", "klt-2.4+sink", "klt-2+sink")
TOGETHER = ("klt-3.4-joint+sink", "klt-2.4-joint+sink", "klt-2-joint+sink", "klt-1.5-joint+sink")
BUDGETS = (*APART, *TOGETHER)
SHAPES = (
    "klt-4.4+sink", *APART, "klt-1.5+sink", *TOGETHER, "klt-1.2-joint+sink",
    "klt-2.4-fast+sink", "klt-2.4-fast-headsall+sink", "k:klt-2.4-heads1+sink,v:klt-2.4+sink",
    "klt-2.4-fast-joint+sink", "klt-2.4-joint-heads1+sink",
)  # fmt: skip
AT_24 = ("klt-2.4+sink", "klt-2.4-joint+sink")


@dataclass(frozen=True)
class Stage:
    """One calibration and what is measured with it.

    Attributes:
        texts: it is made on, by name; TEXT is that of the command line.
        samples: over all texts together.
        policies: measured on TEXT.
        options: others of the calibration's request.
        elsewhere: policies measured on the other texts too.
        seqlen: of samples and of measured segments, where it is not that of the command line.
    """

    texts: tuple[str, ...]
    samples: int
    policies: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    seqlen: int | None = None


_KVQUANT = {"method": "codebook", "weights": "fisher", "times_half_range": False, "sink": 1}
_ONE_BLOCK = {"blocks": (0,)}
_MIX = (TEXT, "pydoc")
_LOCAL = ("pydoc", "stdlib", "licences", "manuals")

STAGES = {
    "baselines": Stage((TEXT,), 16, CODEBOOKS, _KVQUANT, ("nuq3+1%+sink", "nuq2+1%+sink")),
    "baselines-foreign": Stage(("pydoc",), 16, CODEBOOKS[1:], _KVQUANT),
    "own": Stage((TEXT,), 16, SHAPES, {}, AT_24),
    "default": Stage(("pydoc", "stdlib"), 16, BUDGETS, _ONE_BLOCK | {"draw": 8}, AT_24),
    "drawn": Stage((), 16, BUDGETS, _ONE_BLOCK | {"draw": 16}, AT_24),
    "drawn-foreign": Stage(("pydoc",), 32, BUDGETS, _ONE_BLOCK | {"draw": 16}, AT_24),
    "foreign": Stage(("pydoc",), 16, BUDGETS, _ONE_BLOCK, AT_24),
    "mixed": Stage(_MIX, 32, BUDGETS, _ONE_BLOCK, AT_24),
    "local": Stage(_LOCAL, 32, BUDGETS, _ONE_BLOCK, BUDGETS[:2]),
    "broad": Stage((TEXT, *_LOCAL), 40, BUDGETS, _ONE_BLOCK, BUDGETS[:2]),
    "noise": Stage((TEXT,), 16, AT_24, _ONE_BLOCK | {"weights": "noise"}),
    "more": Stage((TEXT,), 32, BUDGETS, _ONE_BLOCK | {"rows": 65536}),
    "shrunk-0.1": Stage((TEXT,), 16, BUDGETS, _ONE_BLOCK | {"shrinkage": 0.1}),
    "shrunk-0.3": Stage((TEXT,), 16, BUDGETS, _ONE_BLOCK | {"shrinkage": 0.3}),
    "foreign-shrunk-0.3": Stage(("pydoc",), 16, BUDGETS, _ONE_BLOCK | {"shrinkage": 0.3}),
    "local-shrunk-0.3": Stage(_LOCAL, 32, BUDGETS, _ONE_BLOCK | {"shrinkage": 0.3}),
    "baselines-8192": Stage((TEXT,), 4, CODEBOOKS[1:], _KVQUANT, seqlen=8192),
    "own-8192": Stage((TEXT,), 4, BUDGETS, _ONE_BLOCK, seqlen=8192),
}


def main() -> None:
    """Runs the stages that are asked for and not done yet, then writes the table."""
    options = read_arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    draw.DOCUMENT = options.document
    if options.simulate_in_torch:
        replace_simulation()
    elif options.implementation:
        force_simulation(options.implementation)
    for name in options.stages.split(","):
        started = time.perf_counter()
        run_stage(name, STAGES[name], options)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    table = make_table(options)
    (options.folder / "table.md").write_text(table, encoding="utf-8")
    print(table)


def read_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", default="baselines,own,foreign,mixed", help=", ".join(STAGES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--segments", type=int, default=48)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--elsewhere", default="stdlib,licences,manuals", help="other texts; their second halves count")
    parser.add_argument("--elsewhere-segments", type=int, default=16)
    parser.add_argument("--divide-samples", type=int, default=1, help="for a quick look")
    parser.add_argument("--document", type=int, default=draw.DOCUMENT, help="tokens of a document that the model draws")
    parser.add_argument("--simulate-in-torch", action="store_true")
    parser.add_argument(
        "--implementation", default="", help="of simulate_klt, such as cuda_mma; the default is the best"
    )
    options = parser.parse_args()
    if unknown := set(options.stages.split(",")) - set(STAGES):
        parser.error(f"unknown stages {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    return options


def run_stage(name: str, stage: Stage, options: argparse.Namespace) -> None:
    """Calibrates and measures; what a text lacks on this machine is said and left out."""
    there = [text for text in stage.texts if text == TEXT or is_there(text)]
    seqlen = stage.seqlen or options.seqlen
    calibration = options.folder / f"{name}.calibration"
    if not calibration.exists():
        request = CalibrationRequest(
            options.model,
            calibration,
            text_files=(str(options.text),) if TEXT in there else (),
            datasets=tuple(text for text in there if text != TEXT),
            nsamples=max(len(there), stage.samples // options.divide_samples),
            seqlen=seqlen,
            device=options.device,
            dtype=options.dtype,
            **({"method": "klt"} | stage.options),
        )
        run_calibration(prepare_calibration(request))
    elsewhere = [text for text in options.elsewhere.split(",") if text and is_there(text)] if stage.elsewhere else []
    for text, policies in [(TEXT, stage.policies), *((text, stage.elsewhere) for text in elsewhere)]:
        request = Request(
            options.model,
            policies,
            text_files=(str(options.text),) if text == TEXT else (),
            datasets=() if text == TEXT else (text,),
            seqlen=seqlen,
            limit=options.segments * options.seqlen // seqlen if text == TEXT else options.elsewhere_segments,
            # Half: a calibration on one of those texts may have needed as much.
            skip=0.25 if text == TEXT else 0.5,
            calibration=calibration,
            json_path=options.folder / f"{name}.{text}.json",
            resume=True,
            device=options.device,
            dtype=options.dtype,
            error_segments=0,
        )
        run(prepare(request))


def is_there(name: str) -> bool:
    """Whether this machine has a text; says so where it does not."""
    try:
        load_text(name)
    except TextError as error:
        print(f"left out: {error}", file=sys.stderr)
        return False
    return True


def make_table(options: argparse.Namespace) -> str:
    """All rows there are, each with its share of what KVQuant's method loses on the same text at as many bits."""
    documents = {}
    for path in sorted(options.folder.glob("*.json")):
        name, _, text = path.stem.partition(".")
        documents[name, text] = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| calibration | text | tokens | policy | bits | rise | 95 % interval | of nuq3-1% | of nuq2-1% |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = list(STAGES)
    for (name, text), document in sorted(documents.items(), key=lambda item: (item[0][1], order.index(item[0][0]))):
        baselines = documents.get(("baselines" if document["seqlen"] < 8192 else "baselines-8192", text), {"rows": []})
        rises = {row["policy"]: row["ppl_delta"] for row in baselines["rows"]}
        for row in document["rows"]:
            if row["policy"] != "fp16":
                lines.append(table_line(name, text, document, row, rises))
    said = "simulated in torch on the model's device" if options.simulate_in_torch else "simulated by kvpack"
    reference = {text: row["ppl"] for (_, text), d in documents.items() for row in d["rows"] if row["policy"] == "fp16"}
    told = ", ".join(f"{text} {ppl:.3f}" for text, ppl in sorted(reference.items()))
    return f"klt {said}; fp16 perplexity: {told}.\n\n" + "\n".join(lines) + "\n"


def table_line(name: str, text: str, document: dict, row: dict, rises: dict[str, float]) -> str:
    """One policy of one document."""
    shares = [f"{100 * row['ppl_delta'] / rises[policy]:.1f} %" if policy in rises else "" for policy in CODEBOOKS[1:]]
    reference = next(other for other in document["rows"] if other["policy"] == "fp16")
    low, high = paired_interval(np.array(row["nll"]), np.array(reference["nll"])) or (float("nan"), float("nan"))
    assert abs(perplexity(np.array(row["nll"])) - row["ppl"]) < 1e-9 * row["ppl"]
    cells = [
        *(name, text, str(document["seqlen"]), row["policy"], f"{row['bits']:.3f}", f"{row['ppl_delta']:.3f}"),
        *(f"{low:.3f} to {high:.3f}", *shares),
    ]
    return "| " + " | ".join(cells) + " |"


def replace_simulation() -> None:
    """Puts torch in the place of the native simulation of klt."""
    import kvpack.klt

    kvpack.klt.simulate_klt = simulate_in_torch  # type: ignore[assignment]


def force_simulation(name: str) -> None:
    """Simulates klt with one implementation, whatever the others of that device can do."""
    import kvpack.klt
    from kvpack import ops

    simulate = kvpack.klt.simulate_klt

    def forced(*arguments: Any, **keywords: Any) -> Any:
        ops.force_implementation(name)
        try:
            return simulate(*arguments, **keywords)
        finally:
            ops.force_implementation("")

    kvpack.klt.simulate_klt = forced  # type: ignore[assignment]


def simulate_in_torch(x: Any, tables: Any, *, protected_tokens: int = 0, out: Any = None) -> Any:
    """kvpack.klt.simulate_klt by torch's own operations: the same rule, rounded in another order."""
    import torch

    from kvpack.calibrate.klt_fit import round_scale

    out = torch.empty_like(x) if out is None else out
    for table, channels in tables.slices():
        part = x[..., channels]
        mean, analysis, synthesis, in_scale, centroids = (torch.as_tensor(each) for each in table.tensors.values())
        if table.coded == 0:
            result = mean.expand(part.shape)
        else:
            z = (part.float() - mean) @ analysis
            r = z[..., in_scale.bool()].square().mean(dim=-1, keepdim=True).sqrt()
            r = round_scale(r).float()
            unit = torch.where(r > 0, z[..., : table.coded] / r.clamp(min=1e-30), torch.zeros_like(z[..., :1]))
            result = mean + r * (nearest_centroids(unit, table.levels[: table.coded], centroids) @ synthesis)
        result = result.to(x.dtype, copy=True)
        result[..., :protected_tokens, :] = part[..., :protected_tokens, :]
        out[..., channels] = result
    return out


def nearest_centroids(unit: Any, levels: np.ndarray, centroids: Any) -> Any:
    """The centroid nearest to every coefficient, all coefficients of one number of levels at once."""
    import torch

    flat = unit.reshape(-1, len(levels))
    result = torch.empty_like(flat)
    first = column = 0
    for count in sorted(set(levels.tolist()), reverse=True):
        columns = slice(column, column + int((levels == count).sum()))
        column = columns.stop
        codebooks = centroids[first : first + count * (columns.stop - columns.start)].view(-1, count)
        first += codebooks.numel()
        middles = ((codebooks[:, 1:] + codebooks[:, :-1]) / 2).contiguous()
        places = torch.searchsorted(middles, flat[:, columns].T.contiguous())
        result[:, columns] = codebooks.gather(1, places).T
    return result.view(unit.shape)


if __name__ == "__main__":
    main()
