"""The command `kvpack`: options, exit codes and what is printed. What it does: evaluate/, calibrate/, doctor.py.

Exit codes: 0 done, 1 failed on the way, 2 bad input (said before minutes are spent), 130 and 143 interrupted.
"""

from __future__ import annotations

import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
except ImportError as error:
    raise SystemExit(f"kvpack: the command line needs {error.name}: pip install 'kvpack[eval]'") from error

if TYPE_CHECKING:
    from kvpack.evaluate.plan import Plan, Request

from kvpack.cli_calibrate import calibrate_command, sensitivities_command
from kvpack.cli_induction import induction_command

FAILED, BAD_INPUT = 1, 2

app = typer.Typer(
    name="kvpack",
    help="Compresses the KV cache of language models and measures what that costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Interrupted(BaseException):
    """A signal asks us to stop. Not KeyboardInterrupt, which click would turn into exit code 1."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def main() -> None:
    """Runs the command line; ends the process with one of the exit codes above."""
    try:
        with _interruptible():
            app()
    except Interrupted as interrupted:
        print(f"kvpack: stopped by {interrupted}", file=sys.stderr)
        sys.exit(interrupted.exit_code)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turns Ctrl-C and the polite kill into an exception, so that bars are taken down and a message is said."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        # A process that was started with the signal ignored (nohup, a background job) keeps ignoring it.
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_version(wanted: bool) -> None:
    if wanted:
        import kvpack

        print(f"kvpack {kvpack.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or name, or a GGUF file.", metavar="MODEL")],
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="What to measure, as int4+1%; once for each. fp16 is always the first row."),
    ] = None,
    datasets: Annotated[
        list[str] | None,
        typer.Option(
            help="pydoc, stdlib, licences, manuals, wikitext2, ptb, c4, with commas between; pydoc when neither this "
            "nor --text is given."
        ),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A UTF-8 text file to measure on; once for each.")] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens of a segment.")] = 2048,
    limit: Annotated[int, typer.Option(help="At most this many segments of each text.")] = 512,
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on the CPU, else the checkpoint's), float32, bfloat16, float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the results here, after every finished row.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the rows that --json FILE lacks.")] = False,
    report: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="Write a page with plots, for any browser.")
    ] = None,
    reference_memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Memory for the logits of fp16; else half of what is available."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="What kvpack calibrate wrote, for klt, nuq and +calibrated policies."),
    ] = None,
    skip: Annotated[
        str, typer.Option(help="Share of each text, from its start, to leave out, as 25%: what a calibration has seen.")
    ] = "0%",
    error_segments: Annotated[
        int,
        typer.Option(help="Segments of each text, from the first, that also measure errors per layer; 0 is none."),
    ] = 1,
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time went.")] = False,
) -> None:
    """Measures what KV cache policies cost MODEL: perplexity, KL and top-1 agreement against fp16, bits per element."""
    from kvpack.terminal import make_console

    errors = make_console(stderr=True)
    with one_message(errors, BAD_INPUT):
        from kvpack.evaluate.plan import Request

        skipped = parse_share(skip, "skip is")
    request = Request(
        model=model,
        policies=tuple(policy or ()),
        datasets=split(datasets),
        text_files=tuple(text or ()),
        seqlen=seqlen,
        limit=limit,
        dtype=dtype,
        device=device,
        json_path=json_file,
        resume=resume,
        report_path=report,
        reference_memory_gib=reference_memory,
        calibration=calibration,
        skip=skipped,
        error_segments=error_segments,
        command=shlex.join(["kvpack", *sys.argv[1:]]),
    )
    plan = _evaluate(request, errors)
    output = make_console()
    _print_outcome(output, plan, profile=profile)


def _evaluate(request: Request, errors: Console) -> Plan:
    from kvpack.evaluate.plan import prepare
    from kvpack.evaluate.run import run, write_page
    from kvpack.terminal import ProgressDisplay

    plan = None
    try:
        with ProgressDisplay(errors) as display:
            with one_message(errors, BAD_INPUT):
                plan = prepare(request, display)
            if request.dtype == "auto" and plan.device == "cpu":
                display.note("computing in float32, since this is a CPU (--dtype changes it)")
            with one_message(errors, FAILED):
                run(plan, display)
                write_page(plan)
    except Interrupted as interrupted:
        errors.print(f"kvpack: stopped by {interrupted}; {_kept(plan)}", markup=False, soft_wrap=True)
        raise typer.Exit(interrupted.exit_code) from interrupted
    return plan


def _kept(plan: Plan | None) -> str:
    """Says what an interrupted run leaves."""
    rows = [] if plan is None else plan.document["rows"]
    if not rows:
        return "no row was finished"
    if plan.json_path is None:
        return f"{len(rows)} finished rows are lost, since there was no --json FILE"
    return f"{len(rows)} finished rows are in {plan.json_path}, and --resume goes on from there"


@contextmanager
def one_message(console: Console, exit_code: int) -> Iterator[None]:
    """Turns what a user can do something about into one line; anything else is a bug and keeps its traceback."""
    from kvpack.terminal import print_error

    try:
        yield
    except (ValueError, NotImplementedError, OSError, ImportError, MemoryError, RuntimeError) as error:
        print_error(console, str(error) or type(error).__name__)
        raise typer.Exit(exit_code) from error


def _print_outcome(output: Console, plan: Plan, *, profile: bool) -> None:
    from kvpack.terminal import print_profile, print_results

    output.print()
    print_results(output, plan.document)
    if profile:
        print_profile(output, plan.document["profile"])
    for what, path in (("results", plan.json_path), ("report", plan.report_path)):
        if path is not None:
            output.print(f"{what}: {path}", markup=False, soft_wrap=True)


def split(given: list[str] | None) -> tuple[str, ...]:
    """Names of repeated options that may also hold several with commas between."""
    return tuple(name.strip() for part in given or () for name in part.split(",") if name.strip())


def parse_share(text: str, what: str = "outliers are") -> float:
    """A share as 1% or 0.5%, exactly the number that a policy's `+1%` is."""
    match = re.fullmatch(r"(\d{1,2}(?:\.\d{1,9})?)\s*%", text.strip(), re.ASCII)
    if match is None and text.strip() != "0":
        raise ValueError(f"{what} {text!r}; expected a share as 1% or 0.5%, from 0% to below 100%")
    return float(Decimal(match[1]) / 100) if match else 0.0


app.command("calibrate")(calibrate_command)
app.command("sensitivities")(sensitivities_command)
app.command("induction")(induction_command)


@app.command()
def policies() -> None:
    """Lists the named policies and what can be added to them."""
    from kvpack.policy import list_presets
    from kvpack.terminal import make_console, print_table

    console = make_console()
    print_table(console, ("policy", "what it does"), list_presets().items())
    console.print()
    print_table(console, ("added as", "what it changes"), _MODIFIERS.items())


_MODIFIERS = {
    "+1%": "the share of each vector's values, half at each end, that stays exact (+0.5% and so on)",
    "+sink, +sinkN": "the first token, or N of them, of every sequence stay exact",
    "+windowN": "the last N tokens stay exact",
    "+causal": "statistics of groups of past tokens only, as a decoder could; without it of the whole segment (oracle)",
    "+calibrated": "keys on static ranges of channels from a calibration, which a decoder could do too (int, nuq, nf)",
    "+clamp": "integer zero points",
    "+qnorm": "Q-Norm: centroids of nuq moved so that quantised values keep mean and deviation",
    "+compat": "KVQuant's own tool bit for bit (int, nuq, nf)",
    "+pre_rope, +seedN": "keys of turbo before RoPE; another rotation",
    "+kth_value": "the published threshold rule of mustafar, which keeps ties",
    "k:A,v:B": "policy A for keys, B for values",
    ";layers0-1,5=A": "policy A for layers 0, 1 and 5; after the policy of the others",
}


@app.command()
def doctor() -> None:
    """Prints versions, processor, GPU, and which implementation of each operation would run here."""
    from kvpack.doctor import examine
    from kvpack.terminal import make_console, print_table

    console = make_console()
    found = examine()
    print_table(console, ("package", "version"), found["versions"].items())
    console.print()
    machine = (
        ("processor", found["cpu"]),
        ("features", found["features"]),
        ("cores", str(found["cores"])),
        ("memory", f"{found['memory_gib']} GiB" if found["memory_gib"] else "unknown"),
        ("GPU", found["gpu"] or "none that torch can see"),
        ("CUDA side", found["cuda"]),
    )
    print_table(console, ("machine", ""), machine)
    console.print()
    if found["problem"]:
        console.print(found["problem"], markup=False, soft_wrap=True)
        return
    rows = [
        (row["operation"], row["name"], row["device"], _outlook(row), str(row["needs"]))
        for row in found["implementations"]
    ]
    print_table(console, ("operation", "implementation", "device", "here", "needs"), rows)


def _outlook(row: dict[str, Any]) -> str:
    """What the registry says about one implementation on this machine."""
    if row["selected"]:
        return "would run"
    return "could run" if row["available"] else "cannot run"
