"""The commands `kvpack calibrate` and `kvpack sensitivities`: options and output. The work is calibrate/."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from kvpack.calibrate.plan import Request

_CODEBOOK_BITS = "2,3,4"


def calibrate_command(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or name, or a GGUF file.", metavar="MODEL")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="The file to write (safetensors).")],
    method: Annotated[
        str, typer.Option(help="codebook (for nuq and +calibrated) or klt (transform coding, any number of bits).")
    ] = "codebook",
    text: Annotated[list[str] | None, typer.Option(help="A UTF-8 text file to calibrate on; once for each.")] = None,
    datasets: Annotated[
        list[str] | None,
        typer.Option(
            help="pydoc, stdlib, licences, manuals, wikitext2, ptb, c4, with commas between; when neither this nor "
            "--text is given pydoc, for klt pydoc, stdlib and what the model draws."
        ),
    ] = None,
    nsamples: Annotated[int, typer.Option(help="Samples, over all texts together and with those drawn.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens of a sample.")] = 2048,
    bits: Annotated[
        str | None,
        typer.Option(
            help=f"codebook: widths to fit, out of 2, 3, 4, 5, 8 ({_CODEBOOK_BITS}). klt: the file serves all; budgets "
            "whose sharing out is shown, as 2.4."
        ),
    ] = None,
    outliers: Annotated[str, typer.Option(help="codebook: share of each vector that thresholds leave outside.")] = "1%",
    sink: Annotated[
        bool, typer.Option("--sink", help="Leave the first token of every sample out; klt always does.")
    ] = False,
    weights: Annotated[
        str,
        typer.Option(
            help="What errors weigh: fisher (gradients), query or none (codebook, forward passes only), noise (klt, "
            "forward passes only); auto is fisher where gradients fit into memory, else query or noise."
        ),
    ] = "auto",
    no_gradients: Annotated[
        bool, typer.Option("--no-gradients", help="As --weights query (codebook) or noise (klt).")
    ] = False,
    compat: Annotated[
        bool, typer.Option("--compat", help="Weigh errors in normalised units, as KVQuant does: without half ranges.")
    ] = False,
    blocks: Annotated[
        str,
        typer.Option(help="klt: heads that are transformed together, a number or all; several with commas between."),
    ] = "all,1",
    shrinkage: Annotated[float, typer.Option(help="klt: how far Fisher matrices move to their diagonals.")] = 0.0,
    rows: Annotated[int, typer.Option(help="klt: at most so many tokens fit the codebooks.")] = 16384,
    draw: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="klt: so many of the samples the model draws itself, the texts give the rest; half when no text is "
            "named, else 0.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which windows of texts are taken, and what is drawn.")] = 0,
    whole_text: Annotated[
        bool, typer.Option("--whole-text", help="Take windows from all of a text, not only from its first part.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run left.")] = False,
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on the CPU, else the checkpoint's), float32, bfloat16, float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
) -> None:
    """Fits to MODEL what policies need to know of it, and writes it to one file."""
    from kvpack.cli import BAD_INPUT, one_message, parse_share, split
    from kvpack.terminal import make_console

    errors = make_console(stderr=True)
    with one_message(errors, BAD_INPUT):
        from kvpack.calibrate.plan import Request

        shown = _parse_budgets(bits or "2.4") if method == "klt" else []
        request = Request(
            model=model,
            output=output,
            method=method,
            text_files=tuple(text or ()),
            datasets=split(datasets),
            nsamples=nsamples,
            seqlen=seqlen,
            bits=(2, 3, 4) if method == "klt" else _parse_bits(bits or _CODEBOOK_BITS),
            outlier_fraction=parse_share(outliers),
            sink=int(sink),
            weights=_chosen_weights(method, weights, no_gradients=no_gradients),
            times_half_range=not compat,
            blocks=_parse_blocks(blocks),
            shrinkage=shrinkage,
            rows=rows,
            draw=draw,
            seed=seed,
            whole_text=whole_text,
            resume=resume,
            dtype=dtype,
            device=device,
        )
    _calibrate(request, errors, shown)


def _calibrate(request: Request, errors: Console, shown: list[str]) -> None:
    from kvpack.calibrate import prepare, run
    from kvpack.cli import BAD_INPUT, FAILED, Interrupted, one_message
    from kvpack.terminal import ProgressDisplay, make_console
    from kvpack.terminal_calibration import print_calibration, print_sensitivities

    try:
        with ProgressDisplay(errors) as display:
            with one_message(errors, BAD_INPUT):
                plan = prepare(request, display)
            with one_message(errors, FAILED):
                calibration = run(plan, display)
    except Interrupted as interrupted:
        kept = "what is finished is kept, and --resume goes on from there"
        errors.print(f"kvpack: stopped by {interrupted}; {kept}", markup=False, soft_wrap=True)
        raise typer.Exit(interrupted.exit_code) from interrupted
    console = make_console()
    print_calibration(console, calibration)
    if shown:
        console.print()
        print_sensitivities(console, calibration, [f"klt-{budget}" for budget in shown])


def sensitivities_command(
    file: Annotated[str, typer.Argument(help="What kvpack calibrate --method klt wrote.", metavar="FILE")],
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="Also show the bits each layer gets, as klt-2.4; once for each."),
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the numbers here.")] = None,
) -> None:
    """Shows how much the keys and the values of each layer matter: the loss that a small error in them costs."""
    import json

    from kvpack.cli import BAD_INPUT, one_message
    from kvpack.terminal import make_console
    from kvpack.terminal_calibration import describe_sensitivities, print_sensitivities

    with one_message(make_console(stderr=True), BAD_INPUT):
        from kvpack.calibrate import KltCalibration
        from kvpack.evaluate import results

        path = None if json_file is None else results.check_writable(json_file, "sensitivities")
        calibration = KltCalibration.load(file)
        described = describe_sensitivities(calibration, policy or [])
    print_sensitivities(make_console(), calibration, policy or [])
    if path is not None:
        path.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _chosen_weights(method: str, weights: str, *, no_gradients: bool) -> str:
    if not no_gradients:
        return weights
    if weights != "auto":
        raise ValueError(f"--no-gradients and --weights {weights} are two answers to one question; give one")
    return "noise" if method == "klt" else "query"


def _parse_bits(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(re.fullmatch(r"\d{1,3}", part, re.ASCII) for part in parts):
        raise ValueError(f"bits are {text!r}; expected numbers with commas between, as 2,3,4")
    return tuple(map(int, parts))


def _parse_budgets(text: str) -> list[str]:
    """Budgets as texts that policies take; klt itself refuses those out of its range."""
    from kvpack.policy import parse_policy

    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        parse_policy(f"klt-{part}")
    return parts


def _parse_blocks(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch(r"all|[1-9]\d{0,4}", part, re.ASCII) for part in parts):
        raise ValueError(f"blocks are {text!r}; expected numbers of heads or all, with commas between, as all,1")
    return tuple(0 if part == "all" else int(part) for part in parts)
