"""Samples that the model draws itself, at temperature 1 and from all of its vocabulary: calibration without any text.

They are what the model takes text to be: no match for samples of the text's own kind, and seldom as far off as those of
another (figures in docs/klt.md). A sample is put together from shorter documents, drawn side by side: one forward pass
per token of a document instead of one per token of a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from kvpack.calibrate.base import CalibrationError
from kvpack.calibrate.collect import CollectError
from kvpack.evaluate.listener import Listener
from kvpack.models.load import LoadedModel, kv_shape

if TYPE_CHECKING:
    from kvpack.calibrate.plan import Plan
    from kvpack.calibrate.spool import Spool

DOCUMENT = 256
"""Tokens of a document; the last one of a sample is cut where its length does not divide."""
_BATCH_BYTES = 2 << 30
"""At most so much for the cache and the predictions of the documents drawn side by side; at least one is drawn."""
_PREDICTION_BYTES = 4 + 4 + 4 + 8
"""Per token of the vocabulary: logits as they come and in float32, their softmax, and its sums in float64."""
_FILE = "drawn"


def choose_start_token(tokenizer: Any, config: Any) -> int:
    """The token every document starts with: beginning of sequence, else end of sequence, as the model has them.

    Args:
        tokenizer: says first what a token is.
        config: of the model, for what the tokenizer does not say.

    Raises:
        ValueError: there is neither, or the model has no such token.
    """
    config = config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        for owner in (tokenizer, config):
            found = getattr(owner, name, None)
            token = found[0] if isinstance(found, (list, tuple)) and found else found
            if isinstance(token, int):
                if not 0 <= token < config.vocab_size:
                    raise ValueError(f"{name} is {token}; the model has tokens 0 to {config.vocab_size - 1}")
                return token
    raise ValueError(
        "the model has neither a token that begins a sequence nor one that ends it, so it cannot draw samples: "
        "draw 0 of them, from texts alone"
    )


def draw_samples(
    model: nn.Module, start_token: int, count: int, seqlen: int, *, seed: int, device: str, listener: Listener
) -> np.ndarray:
    """Lets a model write samples.

    An end of sequence is kept, and the model goes on behind it. Every document has its own random numbers, so that a
    seed means the same on every device and in batches of every size, as far as arithmetic allows: where a sum of
    probabilities ends at the random number up to rounding, another token comes, and all behind it are others too.

    Args:
        model: a transformers model in evaluation mode.
        start_token: the first of every document, from choose_start_token.
        count: samples, at least 1.
        seqlen: tokens of a sample, at least 1.
        seed: decides which.
        device: of the model.
        listener: hears of every token, count_forwards of them.

    Returns:
        int64 [count, seqlen], documents of DOCUMENT tokens one behind the other.

    Raises:
        CollectError: predictions that are not finite.
    """
    length = min(DOCUMENT, seqlen)
    documents = [(sample, first) for sample in range(count) for first in range(0, seqlen, length)]
    batch = _documents_of_batch(model, length)
    drawn = []
    # Not inference_mode: what a model keeps from here, as rotations that grow, could not meet gradients later.
    with torch.no_grad():
        for first in range(0, len(documents), batch):
            chosen = documents[first : first + batch]
            numbers = [np.random.default_rng((seed, *document)).random(length) for document in chosen]
            what = f"of documents {first + 1} to {first + len(chosen)} of {len(documents)}"
            uniforms = torch.from_numpy(np.stack(numbers)).to(device)
            drawn.append(_draw_documents(model, start_token, uniforms, what, listener))
    return np.concatenate(drawn).reshape(count, -1)[:, :seqlen].copy()


def count_forwards(model: nn.Module, count: int, seqlen: int) -> int:
    """Forward passes that draw_samples takes."""
    length = min(DOCUMENT, seqlen)
    documents = count * -(-seqlen // length)
    return -(-documents // _documents_of_batch(model, length)) * (length - 1)


def remaining_steps(plan: Plan, loaded: LoadedModel, spool: Spool, header: dict[str, Any]) -> int:
    """Units of work that add_drawn still has to do, for the time that is left: a forward pass is about one."""
    count = header.get("drawn", 0)
    if not count or spool.load_numbers(_FILE):
        return 0
    return count_forwards(loaded.model, count, plan.request.seqlen)


def add_drawn(plan: Plan, loaded: LoadedModel, spool: Spool, header: dict[str, Any], listener: Listener) -> None:
    """Puts the samples that the model draws behind those of texts in the plan; the spool keeps them at once.

    So an interrupted run goes on with the very same samples, whatever the arithmetic; one that was interrupted while
    it drew begins drawing again.

    Raises:
        CollectError: predictions that are not finite.
        CalibrationError: what the spool holds is not what was written.
    """
    count, seqlen = header.get("drawn", 0), plan.request.seqlen
    if not count:
        return
    drawn = _load_drawn(spool, (count, seqlen), loaded.model.config.get_text_config().vocab_size)
    if drawn is None:
        token = choose_start_token(plan.tokenizer, plan.files.config)
        drawn = draw_samples(
            loaded.model, token, count, seqlen, seed=header["seed"], device=loaded.device, listener=listener
        )
        spool.save_numbers(_FILE, {"tokens": drawn.tolist()})
    plan.samples = np.concatenate([plan.samples[: plan.request.nsamples - count], drawn])


def _load_drawn(spool: Spool, shape: tuple[int, int], vocabulary: int) -> np.ndarray | None:
    """What add_drawn kept; None where nothing is drawn yet."""
    numbers = spool.load_numbers(_FILE)
    path = spool.path / f"{_FILE}.json"
    if not numbers:
        if spool.samples_done:
            raise CalibrationError(
                f"{path} is missing, though {spool.samples_done} samples are done, which come after drawing; "
                "run without --resume"
            )
        return None
    try:
        tokens = np.array(numbers["tokens"])
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be resumed: {error!r}; run without --resume") from error
    if tokens.shape != shape or tokens.dtype != np.int64:
        raise CalibrationError(
            f"{path} holds {tokens.dtype} {list(tokens.shape)}; expected int64 {list(shape)}: run without --resume"
        )
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise CalibrationError(
            f"{path} holds tokens {tokens.min()} to {tokens.max()}; the model has 0 to {vocabulary - 1}: run without "
            "--resume"
        )
    return tokens


def _documents_of_batch(model: nn.Module, length: int) -> int:
    """Documents that are drawn side by side."""
    config = model.config.get_text_config()
    kv_heads, head_dim = kv_shape(config)
    cache = 2 * config.num_hidden_layers * kv_heads * head_dim * length * model.dtype.itemsize
    return max(1, _BATCH_BYTES // (cache + config.vocab_size * _PREDICTION_BYTES))


def _draw_documents(
    model: nn.Module, start_token: int, uniforms: torch.Tensor, what: str, listener: Listener
) -> np.ndarray:
    """Documents of one batch, int64 [documents, length], from a random number in [0, 1) for each token."""
    documents, length = uniforms.shape
    tokens = torch.full((documents, length), start_token, dtype=torch.int64, device=uniforms.device)
    cache = DynamicCache(config=model.config)
    for place in range(1, length):
        step = f"drawing token {place + 1} of {length} {what}"
        listener.step(step)
        logits = model(input_ids=tokens[:, place - 1 : place], past_key_values=cache, use_cache=True).logits[:, -1]
        if not bool(torch.isfinite(logits).all()):
            raise CollectError(f"{step}: predictions are not finite in {logits.dtype}")
        tokens[:, place] = _choose_tokens(logits, uniforms[:, place])
        listener.advance(1)
    return tokens.cpu().numpy()


def _choose_tokens(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token at which the sum of probabilities passes the random number; logits [documents, vocabulary]."""
    sums = torch.softmax(logits.float(), dim=-1).double().cumsum(dim=-1)
    chosen = torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)[:, 0]
    # Rounding can lift the product to the last sum, though hardly ever.
    return chosen.clamp(max=logits.shape[-1] - 1)
