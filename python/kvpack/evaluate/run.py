"""Measures what a plan asks for, row after row: the uncompressed model on all datasets, then every policy.

Prints nothing: a listener hears what happens. Checks of the request are plan.py, one row is perplexity.py.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from kvpack.evaluate import results
from kvpack.evaluate.bootstrap import paired_interval, perplexity
from kvpack.evaluate.listener import Listener
from kvpack.evaluate.machine import available_memory_bytes
from kvpack.evaluate.plan import REFERENCE_POLICY, Plan, Request, clock, prepare
from kvpack.klt_methods import describe_tables
from kvpack.models import load
from kvpack.policy import Policy, parse_policy


def run(plan: Plan, listener: Listener | None = None) -> dict[str, Any]:
    """Measures what a plan still lacks, saving after every row.

    Returns:
        The document, schema in docs/evaluation.md.

    Raises:
        EvaluationError: a policy fails on a segment; what is finished is in the file.
        ValueError: the weights cannot be loaded, or the file cannot be written any more.
        NotImplementedError: a policy does not exist for this model.
    """
    listener = listener or Listener()
    pending = [
        (policy, dataset)
        for policy in [None, *plan.policies]
        for dataset in plan.segments
        if results.finished_row(plan.document, _name(policy), dataset) is None
    ]
    if pending:
        _measure(plan, pending, listener)
    else:
        listener.note("every row asked for is finished already")
    results.sort_rows(plan.document, plan.policy_order)
    plan.document["complete"] = True
    plan.document["profile"] = _profile(plan)
    plan.save()
    return plan.document


def _name(policy: Policy | None) -> str:
    return REFERENCE_POLICY if policy is None else policy.name


def _measure(plan: Plan, pending: list[tuple[Policy | None, str]], listener: Listener) -> None:
    from kvpack.evaluate.perplexity import ReferenceLogits, logits_bytes, score_policy
    from kvpack.models.hooks import simulate

    with clock(plan.seconds, "loading"):
        listener.stage(f"loading {plan.files.name} in {plan.dtype} on {plan.device}")
        loaded = load.load_weights(plan.files, plan.tokenizer, dtype=plan.dtype, device=plan.device)
        for policy in plan.policies:
            # A policy that does not fit this model is refused now, not after the forwards of those before it.
            with simulate(loaded.model, policy, calibration=plan.calibration):
                pass
    plan.document["model"] |= {
        "layers": loaded.num_layers,
        "kv_heads": loaded.kv_heads,
        "head_dim": loaded.head_dim,
        "parameters": loaded.parameters,
    }
    plan.save()
    gib = plan.request.reference_memory_gib
    budget = available_memory_bytes(loaded.device) // 2 if gib is None else int(gib * 2**30)
    references = ReferenceLogits(loaded, budget)
    listener.begin(_announce(plan, pending, budget // logits_bytes(loaded, plan.request.seqlen), listener))
    for policy, dataset in pending:
        segments = plan.segments[dataset]
        heard = _Forwards(references, listener, _name(policy), dataset, len(segments))
        options = {"calibration": plan.calibration, "error_segments": plan.request.error_segments}
        scores = score_policy(loaded, references, dataset, segments, policy, heard.on_segment, **options)
        heard.finish()
        row = _row(plan, policy, dataset, scores)
        plan.document["rows"].append(row)
        results.sort_rows(plan.document, plan.policy_order)
        plan.save()
        for part in ("model", "kvpack", "metrics"):
            plan.seconds[part] += getattr(scores.seconds, part)
        listener.row(row)


class _Forwards:
    """Turns what is known of a row (segments begun, reference forwards made) into finished forwards."""

    def __init__(self, references: Any, listener: Listener, policy: str, dataset: str, segments: int) -> None:
        self._references, self._listener = references, listener
        self._row = (policy, dataset)
        self._segments = segments
        self._own_per_segment = 0 if policy == REFERENCE_POLICY else 1
        self._seen = references.forwards

    def on_segment(self, segment: int) -> None:
        self._advance(self._own_per_segment if segment else 0)
        self._listener.segment(*self._row, segment, self._segments)

    def finish(self) -> None:
        self._advance(self._own_per_segment)

    def _advance(self, own: int) -> None:
        made = self._references.forwards - self._seen
        self._seen = self._references.forwards
        self._listener.advance(own + made)


def _announce(plan: Plan, pending: list[tuple[Policy | None, str]], fitting: int, listener: Listener) -> int:
    """Counts the forwards to come, and says so when references have to be computed more than once."""
    kept: set[tuple[str, int]] = set()
    forwards = 0
    for policy, dataset in pending:
        for segment in range(len(plan.segments[dataset])):
            forwards += policy is not None
            if (dataset, segment) not in kept:
                forwards += 1
                if len(kept) < fitting:
                    kept.add((dataset, segment))
    total = sum(len(plan.segments[dataset]) for dataset in {dataset for _, dataset in pending})
    if total > len(kept) and plan.policies:
        listener.note(
            f"the reference logits of {len(kept)} of {total} segments fit in memory; those of the others are computed "
            "again for every policy (--reference-memory GIB changes the limit)"
        )
    return forwards


def _row(plan: Plan, policy: Policy | None, dataset: str, scores: Any) -> dict[str, Any]:
    nll, reference = np.asarray(scores.nll), np.asarray(scores.nll)
    if policy is not None:
        reference = np.asarray(results.finished_row(plan.document, REFERENCE_POLICY, dataset)["nll"])
    low, high = (0.0, 0.0) if policy is None else paired_interval(nll, reference) or (None, None)
    return {
        "policy": _name(policy),
        "dataset": dataset,
        "mode": "oracle" if policy is None else policy.shown_mode,
        "ppl": perplexity(nll),
        "ppl_delta": perplexity(nll) - perplexity(reference),
        "ppl_delta_low": low,
        "ppl_delta_high": high,
        "kl": float(np.mean(scores.kl)),
        "top1": float(np.mean(scores.top1)),
        "bits": scores.bits,
        "table_bits": scores.table_bits,
        "nll": scores.nll,
        "kl_per_segment": scores.kl,
        "top1_per_segment": scores.top1,
        "policy_json": (parse_policy(REFERENCE_POLICY) if policy is None else policy).to_json(),
        "layer_errors": scores.errors.of_tensors(),
        "attention_errors": scores.errors.of_attention(),
        **({} if policy is None else describe_tables(policy, plan.calibration)),
        "seconds": {name: round(getattr(scores.seconds, name), 3) for name in ("total", "model", "kvpack", "metrics")},
    }


def _profile(plan: Plan) -> dict[str, float]:
    """Wall time by part in seconds; `ours_share` is what is not transformers', the tokenizer's or the model's."""
    wall = time.perf_counter() - plan.started
    parts = dict(plan.seconds)
    parts["other"] = max(0.0, wall - sum(parts.values()))
    ours = parts["kvpack"] + parts["metrics"] + parts["other"]
    return {name: round(value, 3) for name, value in parts.items()} | {
        "wall": round(wall, 3),
        "ours_share": round(ours / wall, 4),
    }


def evaluate(model: str, policies: tuple[str, ...] | list[str], **options: Any) -> dict[str, Any]:
    """Measures what policies cost a model: prepare, then run, then the report where one is asked for.

    Args:
        model: folder, GGUF file or name on the Hugging Face hub.
        policies: text forms, as in `kvpack policies`.
        **options: the other fields of Request.

    Returns:
        The document, schema in docs/evaluation.md.

    Raises:
        ValueError, NotImplementedError: from prepare.
        EvaluationError: from run.
    """
    plan = prepare(Request(model, tuple(policies), **options))
    document = run(plan)
    write_page(plan)
    return document


def write_page(plan: Plan) -> None:
    """Writes the HTML page of a finished plan, where its request asks for one."""
    if plan.report_path is not None:
        from kvpack.report import write_report

        write_report(plan.document, plan.report_path)
