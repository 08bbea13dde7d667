"""The flags of KVQuant's two simulation scripts, and the kvpack policy that they mean."""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvpack.codebook_methods import CODEBOOK_BITS, CodebookMethod
from kvpack.methods import DenseMethod, Method
from kvpack.policy import Policy
from kvpack.uniform import UniformMethod

_BITS = (2, 3, 4, 5, 8, 16)
_PROJECTIONS = ("k_proj", "v_proj")


def _names(text: str) -> list[str]:
    """A list as `["k_proj"]`, or names with commas between."""
    try:
        names = ast.literal_eval(text) if text.strip().startswith("[") else text.split(",")
    except (SyntaxError, ValueError):
        names = None
    names = [str(name).strip() for name in names or [] if str(name).strip()] if isinstance(names, list) else [text]
    if unknown := [name for name in names if name not in _PROJECTIONS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no projection; known are {', '.join(_PROJECTIONS)}")
    return names


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags that both scripts have; those below the line are ours."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", metavar="MODEL", help="folder, name on the hub, or GGUF file")
    parser.add_argument("--abits", type=int, default=4, choices=_BITS, help="bits of keys and values; 16 copies")
    parser.add_argument("--perchannel", type=_names, default=["k_proj"], help="as '[\"k_proj\"]'")
    parser.add_argument("--pertoken", type=_names, default=["v_proj"], help="as '[\"v_proj\"]'")
    parser.add_argument("--include_sparse", action="store_true", help="keep outliers exactly")
    parser.add_argument("--sparsity_threshold", type=float, default=0.99, help="0.99 keeps 1 %% of each vector")
    parser.add_argument("--nuq", action="store_true", help="calibrated codebooks instead of grids")
    parser.add_argument("--first_few_fp16", type=int, default=-1, help="first tokens of a sequence that stay exact")
    parser.add_argument("--datasets", default="wikitext2", help="wikitext2, ptb, c4, pydoc, with commas between")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=512, help="segments per dataset")
    parser.add_argument("--nsamples", type=int, default=16, help="calibration samples")
    parser.add_argument("--quantizer_path", help="calibration to read or write: safetensors, whatever its name ends in")
    ours = parser.add_argument_group("of kvpack")
    ours.add_argument("--text", action="append", default=[], help="measure on this file instead of --datasets")
    ours.add_argument("--calibration_text", action="append", default=[], help="calibrate on this file, not on pydoc")
    ours.add_argument("--calibration_seqlen", type=int, help="tokens of a calibration sample; else --seqlen")
    ours.add_argument("--device", default="auto")
    ours.add_argument("--json", dest="json_path", help="results file")
    return parser


def make_policy(options: argparse.Namespace) -> Policy:
    """The policy that the flags mean.

    Raises:
        ValueError: impossible numbers, or a projection that is both per channel and per token.
    """
    if both := set(options.perchannel) & set(options.pertoken):
        raise ValueError(f"{', '.join(sorted(both))} is in --perchannel and in --pertoken; it can be in one of them")
    if options.include_sparse and not 0 < options.sparsity_threshold < 1:
        raise ValueError(f"--sparsity_threshold is {options.sparsity_threshold}; it is between 0 and 1")
    # Rounded as decimals: 1 - 0.99 is 0.010000000000000009, and an outlier share has a name, 1%.
    fraction = round(1 - options.sparsity_threshold, 9) if options.include_sparse else 0.0
    key, value = (_method(options, projection, fraction) for projection in _PROJECTIONS)
    # 16 bits keep every token anyway, and the fp16 row stands for them.
    keeps_all = isinstance(key, DenseMethod) and isinstance(value, DenseMethod)
    return Policy(key, value, sink=0 if keeps_all else max(options.first_few_fp16, 0))


def _method(options: argparse.Namespace, projection: str, fraction: float) -> Method:
    bits = options.abits
    axis: Any = "per_channel" if projection in options.perchannel else "per_token"
    if bits == 16 or projection not in (*options.perchannel, *options.pertoken):
        return DenseMethod()
    if options.nuq:
        return CodebookMethod(bits, axis, outlier_fraction=fraction)
    return UniformMethod(bits, axis, outlier_fraction=fraction)


def run_script(options: argparse.Namespace, *, calibrate_only: bool = False) -> int:
    """Calibrates where that is asked for or needed, measures, and prints perplexities. Returns the exit code."""
    try:
        policy = make_policy(options)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(options.quantizer_path or Path(folder) / "quantizer.safetensors")
            if calibrate_only:
                _calibrate(options, policy, path)
                return 0
            if policy.needs_calibration and not options.quantizer_path:
                print(
                    "--nuq needs codebooks: calibrating first. To keep them: kvquant_llama3_simquant.py MODEL "
                    "--calibrate --quantizer_path FILE, then --nuq --quantizer_path FILE",
                    file=sys.stderr,
                )
                _calibrate(options, policy, path)
            _measure(options, policy, path if policy.needs_calibration else None)
    except (ValueError, NotImplementedError, OSError, RuntimeError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    return 0


def _calibrate(options: argparse.Namespace, policy: Policy, path: Path) -> None:
    from kvpack.calibrate import Request, prepare, run

    fraction = next((m.outlier_fraction for m in (policy.key, policy.value) if hasattr(m, "outlier_fraction")), 0.01)
    request = Request(
        options.model,
        path,
        text_files=tuple(options.calibration_text),
        nsamples=options.nsamples,
        seqlen=options.calibration_seqlen or options.seqlen,
        bits=(options.abits,) if options.abits in CODEBOOK_BITS else (2, 3, 4),
        outlier_fraction=fraction,
        sink=policy.sink,
        device=options.device,
    )
    run(prepare(request))
    if options.quantizer_path:
        print(f"calibration: {path}")


def _measure(options: argparse.Namespace, policy: Policy, calibration: Path | None) -> None:
    from kvpack.evaluate import Request, prepare, run

    datasets = () if options.text else tuple(name.strip() for name in options.datasets.split(",") if name.strip())
    request = Request(
        options.model,
        (policy.name,),
        datasets=datasets,
        text_files=tuple(options.text),
        seqlen=options.seqlen,
        limit=options.limit,
        device=options.device,
        json_path=options.json_path,
        calibration=calibration,
    )
    document = run(prepare(request))
    for row in document["rows"]:
        print(
            f"{row['dataset']}: {row['policy']} ({row['mode']}, {row['bits']:.2f} bits): perplexity {row['ppl']:.4f}, "
            f"fp16 {row['ppl_delta']:+.4f}"
        )
