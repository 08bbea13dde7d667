"""The command `kvpack induction`: its options, and the order of checks. What is measured is evaluate/induction.py."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kvpack.evaluate.induction import InductionScore


def induction_command(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or name, or a GGUF file.", metavar="MODEL")],
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="What to measure; once for each. fp16 is always the first row.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Lengths, both copies together, with commas between.")] = "2048,4096,8192",
    sequences: Annotated[int, typer.Option(help="Random sequences of each length.")] = 1,
    seed: Annotated[int, typer.Option(help="Decides which tokens.")] = 0,
    calibration: Annotated[str | None, typer.Option(metavar="FILE", help="What kvpack calibrate wrote.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the scores here.")] = None,
) -> None:
    """Repeats random tokens and measures how well MODEL predicts the second copy under each policy. Needs no text."""
    import json

    from kvpack.cli import BAD_INPUT, FAILED, one_message
    from kvpack.terminal import ProgressDisplay, make_console, print_table

    errors = make_console(stderr=True)
    with one_message(errors, BAD_INPUT):
        from kvpack.evaluate import results
        from kvpack.methods import check_int
        from kvpack.models import load

        path = None if json_file is None else results.check_writable(json_file, "scores")
        check_int("sequences", sequences, 1, 2**20)
        check_int("seed", seed, 0, 2**32 - 1)
        lengths, policies, tables, files = _check(model, policy or [], tokens, calibration)
        chosen = load.choose_device(device)
        chosen_dtype = load.choose_dtype(dtype, chosen, files)
        tokenizer = load.load_tokenizer(files)
    with ProgressDisplay(errors) as display, one_message(errors, FAILED):
        from kvpack.files import write_whole

        loaded = load.load_weights(files, tokenizer, dtype=chosen_dtype, device=chosen)
        special = set(getattr(tokenizer, "all_special_ids", ()))
        options: dict[str, Any] = {"sequences": sequences, "seed": seed, "excluded": special, "calibration": tables}
        scores = _measure(loaded, lengths, policies, display, options)
        if path is not None:
            document = {"model": files.name, "seed": seed, "scores": [score.to_json() for score in scores]}
            write_whole(path, (json.dumps(document, indent=1) + "\n").encode())
    rows = [
        (str(s.tokens), s.policy, s.mode, f"{s.bits:.2f}", f"{100 * s.accuracy:.2f}", f"{s.nll:.4f}") for s in scores
    ]
    columns = ("tokens", "policy", "mode", "bits", "accuracy %", "nll")
    print_table(make_console(), columns, rows, right=("tokens", "bits", "accuracy %", "nll"))


def _measure(
    loaded: Any, lengths: list[int], policies: list[Any], display: Any, options: dict[str, Any]
) -> list[InductionScore]:
    """Every length under every policy, the uncompressed model first; the display hears of each sequence."""
    from kvpack.evaluate.induction import score_induction

    sequences, scores = options["sequences"], []
    display.begin(len(lengths) * (1 + len(policies)) * sequences, "sequences")
    for length, policy in itertools.product(lengths, (None, *policies)):
        what = f"{'fp16' if policy is None else policy.name} on {length} tokens"

        def on_sequence(number: int, what: str = what) -> None:
            display.step(f"{what}, sequence {number + 1} of {sequences}")

        scores.append(score_induction(loaded, policy, length, on_sequence=on_sequence, **options))
        display.advance(sequences)
    return scores


def _check(
    model: str, policies: list[str], tokens: str, calibration: str | None
) -> tuple[list[int], list[Any], Any, Any]:
    """Everything that needs no weights: lengths, policies, calibration, the model's files."""
    from kvpack.calibration_checks import as_calibration, check_calibration
    from kvpack.models import load
    from kvpack.policy import parse_policy

    parsed = [policy for policy in map(parse_policy, policies) if policy.name != "fp16"]
    parts = [part.strip() for part in tokens.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"tokens are {tokens!r}; expected numbers with commas between, as 2048,4096")
    lengths = [int(part) for part in parts]
    for length in lengths:
        if length < 4 or length % 2:
            raise ValueError(f"tokens is {length}; two equal copies need an even number of at least 4")
    tables = as_calibration(calibration)
    for policy in parsed:
        check_calibration(policy, tables)
    files = load.open_model(model)
    files.check_positions("tokens", max(lengths))
    return lengths, parsed, tables, files
