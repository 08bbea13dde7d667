"""What a study of a model of Llama-3-8B's shape takes on a GPU: seconds per policy, and kvpack's share of them.

Random weights made on the device and random tokens: no download, and only the times mean anything. Each policy is first
checked on one layer's own keys and values against the reference on the CPU, bit for bit. Then segments go through
kvpack.evaluate as `kvpack eval` sends them. What a policy adds is measured against the same forward without it; the
device is waited for on both sides.

    python benches/bench_8b_shape_cuda.py [--layers 32] [--segments 3] [--seqlen 2048] [--policy int4+sink ...]
                                          [--quick | --tiny] [--no-write]

--quick takes 4 layers and 1 segment; --tiny is a toy on any device, to test this script.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers
from common import write_results

import kvpack
from kvpack.calibrate import Calibration
from kvpack.calibrate.fingerprint import ModelFingerprint
from kvpack.calibrate.fit import FitOptions, fit_layer
from kvpack.calibrate.headers import CODEBOOKS
from kvpack.evaluate.perplexity import ReferenceLogits, logits_bytes, score_policy
from kvpack.models.layers import find_attention_layers
from kvpack.models.load import LoadedModel
from kvpack.policy import Policy, parse_policy

POLICIES = (
    "int4+sink", "int4+1%+sink", "int3+1%+sink", "nf3+1%+sink", "nuq3+1%+sink", "nuq3+1%+sink+calibrated",
    "kivi-2+sink", "turbo-3+sink", "mustafar-50+sink",
)  # fmt: skip
LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = {
    "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 300,
}  # fmt: skip
NAME = "bench_8b_shape_cuda"


def make_model(shape: dict[str, Any], device: str, dtype: torch.dtype) -> LoadedModel:
    """A model with random weights, made where it will run: a checkpoint of this size would take longer to read."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(before)
    config = model.config
    return LoadedModel(
        model, None, "Llama-3-8B's shape, random weights", "none", str(dtype).removeprefix("torch."), device,
        config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // config.num_attention_heads,
        config.max_position_embeddings, sum(weights.numel() for weights in model.parameters()),
    )  # fmt: skip


def capture_states(loaded: LoadedModel, tokens: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """Keys before RoPE and values of every layer, [tokens, channels] on the host."""
    states: dict[tuple[int, str], torch.Tensor] = {}
    hooks = []
    for layer in find_attention_layers(loaded.model):
        for kind, module in (("key", layer.module.k_proj), ("value", layer.module.v_proj)):

            def keep(_: Any, __: Any, output: torch.Tensor, place: tuple[int, str] = (layer.index, kind)) -> None:
                states[place] = output[0].detach().cpu()

            hooks.append(module.register_forward_hook(keep))
    with torch.inference_mode():
        loaded.model(input_ids=tokens[None], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return states


def calibrate(loaded: LoadedModel, states: dict[tuple[int, str], torch.Tensor], bits: tuple[int, ...]) -> Calibration:
    """Codebooks and thresholds of one segment's own keys and values, without weights."""
    options = FitOptions(bits, 0.01, times_half_range=True)
    parts = {(layer, kind): fit_layer(x[1:], kind, options) for (layer, kind), x in states.items()}
    seqlen = len(next(iter(states.values())))
    text = {"name": "random tokens", "sha256": "0" * 64, "tokens": seqlen, "samples": 1, "tokens_used": [0, seqlen]}
    header = {
        "schema": CODEBOOKS.name, "version": CODEBOOKS.version, "kvpack": kvpack.__version__, "model_name": loaded.name,
        "model": ModelFingerprint.of(loaded.model).to_json(), "layers": list(range(loaded.num_layers)),
        "bits": list(bits), "outlier_fraction": 0.01, "sink": 1, "weights": "none", "times_half_range": True,
        "nsamples": 1, "seqlen": seqlen, "seed": 0, "dtype": loaded.dtype, "device": loaded.device, "texts": [text],
    }  # fmt: skip
    return Calibration(header, parts)


def check_policy(policy: Policy, loaded: LoadedModel, states: dict[tuple[int, str], torch.Tensor], tables: Any) -> None:
    """One layer's keys and values on the device against the reference implementation on the CPU, bit for bit."""
    for kind in ("key", "value"):
        x = states[loaded.num_layers - 1, kind]
        where = {"head_dim": loaded.head_dim, "layer": loaded.num_layers - 1, "calibration": tables}
        actual = kvpack.simulate_tensor(x.to(loaded.device), policy, kind, **where).cpu()
        kvpack.force_implementation("reference")
        expected = kvpack.simulate_tensor(x, policy, kind, **where)
        kvpack.force_implementation("")
        if not torch.equal(actual, expected):
            raise SystemExit(f"{policy.name}: {int((actual != expected).sum())} {kind} elements differ from the CPU's")


def time_policy(loaded: LoadedModel, references: Any, segments: np.ndarray, policy: Policy | None, tables: Any) -> dict:
    """Scores all segments and says where the time went, in seconds a segment."""
    if loaded.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    scores = score_policy(loaded, references, "random", segments, policy, calibration=tables, error_segments=0)
    if loaded.device == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / len(segments)
    peak = torch.cuda.max_memory_allocated() / 2**30 if loaded.device == "cuda" else None
    return {
        "policy": "fp16" if policy is None else policy.name,
        "mode": "oracle" if policy is None else policy.mode,
        "seconds_per_segment": seconds,
        "compare_seconds_per_segment": scores.seconds.metrics / len(segments),
        "bits": scores.bits,
        "kl": float(np.mean(scores.kl)),
        "peak_memory_gib": peak,
    }


def time_forward(loaded: LoadedModel, segments: torch.Tensor, policy: Policy | None, tables: Any) -> float:
    """Median seconds of one forward with a policy in it, or without; the first one is not counted."""
    seconds = []
    for row in (segments[0], *segments):
        start = time.perf_counter()
        with torch.inference_mode():
            if policy is None:
                loaded.model(input_ids=row[None], use_cache=False, logits_to_keep=1)
            else:
                with kvpack.simulate(loaded.model, policy, calibration=tables):
                    loaded.model(input_ids=row[None], use_cache=False, logits_to_keep=1)
        if loaded.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="fewer than 32, where memory or time demand it")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--policy", action="append", help="instead of the usual ones; once for each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="4 layers and 1 segment")
    parser.add_argument("--tiny", action="store_true", help="a toy model, 2 layers of 128, 96 tokens")
    parser.add_argument("--no-write", action="store_true", help="leave benches/results as it is")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.segments = options.layers or 4, 1
    if options.tiny:
        options.layers, options.seqlen = options.layers or 2, 96
    if options.device == "cpu" and not options.tiny:
        parser.error("there is no GPU; --tiny runs on a CPU")
    return options


def main() -> None:
    """Makes the model, checks and times every policy, prints and writes the rows."""
    options = read_arguments()
    shape = TINY if options.tiny else LLAMA_3_8B
    shape = shape | {"num_hidden_layers": options.layers or shape["num_hidden_layers"]}
    policies = [parse_policy(name) for name in options.policy or POLICIES]
    start = time.perf_counter()
    loaded = make_model(shape, options.device, torch.float32 if options.tiny else torch.bfloat16)
    generator = np.random.default_rng(0)
    segments = generator.integers(3, shape["vocab_size"], (options.segments, options.seqlen))
    tokens = torch.from_numpy(segments).to(options.device)
    print(f"model of {loaded.parameters / 1e9:.2f}e9 weights: {time.perf_counter() - start:.1f} s", flush=True)
    start = time.perf_counter()
    states = capture_states(loaded, tokens[0])
    bits = tuple(sorted({policy.key.bits for policy in policies if policy.needs_calibration})) or (3,)
    tables = calibrate(loaded, states, bits)
    print(f"calibration of {loaded.num_layers} layers: {time.perf_counter() - start:.1f} s", flush=True)
    for policy in policies:
        check_policy(policy, loaded, states, tables)
    references = ReferenceLogits(loaded, (options.segments + 1) * logits_bytes(loaded, options.seqlen))
    dense = time_forward(loaded, tokens, None, tables)
    rows = [time_policy(loaded, references, segments, None, tables) | {"forward_seconds": dense}]
    for policy in policies:
        forward = time_forward(loaded, tokens, policy, tables)
        row = time_policy(loaded, references, segments, policy, tables) | {"forward_seconds": forward}
        row["added_seconds"] = forward - dense
        row["kvpack_share"] = max(0.0, forward - dense) / forward
        rows.append(row)
        print(
            f"{row['policy']:26} {row['bits']:6.2f} bits  {row['seconds_per_segment']:7.3f} s a segment, forward "
            f"{forward:.3f} s ({dense:.3f} s without), kvpack's share {100 * row['kvpack_share']:.1f} %",
            flush=True,
        )
    common = {
        "layers": loaded.num_layers,
        "seqlen": options.seqlen,
        "segments": options.segments,
        "dtype": loaded.dtype,
    }
    if not options.no_write and not options.tiny:
        gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
        command = " ".join(["python", "benches/" + NAME + ".py", *sys.argv[1:]])
        print(write_results(NAME, command, [common | {"gpu": gpu} | row for row in rows]))


if __name__ == "__main__":
    main()
