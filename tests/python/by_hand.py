"""The figures of an evaluation, from their definition."""

from __future__ import annotations

from pathlib import Path

import torch

import kvpack
from kvpack.models import load

SEQLEN = 24


def measure_by_hand(folder: Path, text: str, policy: str | None) -> dict[str, list[float]]:
    """The definitions of docs/numerics.md section 5, one segment and one position at a time."""
    loaded = load.load_model(str(folder), device="cpu")
    token_ids = loaded.tokenizer(text)["input_ids"]
    found: dict[str, list[float]] = {"nll": [], "kl": [], "top1": []}
    for start in range(0, len(token_ids) - SEQLEN + 1, SEQLEN):
        tokens = torch.tensor([token_ids[start : start + SEQLEN]])
        with torch.no_grad():
            reference = loaded.model(input_ids=tokens).logits[0].double()
            logits = reference
            if policy is not None:
                with kvpack.simulate(loaded.model, policy):
                    logits = loaded.model(input_ids=tokens, use_cache=False).logits[0].double()
        nll = kl = top1 = 0.0
        for position in range(SEQLEN - 1):
            p, q = reference[position].log_softmax(0), logits[position].log_softmax(0)
            nll -= q[tokens[0, position + 1]].item()
            kl += (p.exp() * (p - q)).sum().item()
            top1 += float(reference[position].argmax() == logits[position].argmax())
        for name, total in (("nll", nll), ("kl", kl), ("top1", top1)):
            found[name].append(total / (SEQLEN - 1))
    return found
