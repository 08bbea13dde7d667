"""What `kvpack calibrate` and `kvpack sensitivities` print: what a calibration holds, and what matters where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from kvpack.terminal import print_table

if TYPE_CHECKING:
    from kvpack.calibrate.base import ModelCalibration
    from kvpack.calibrate.klt_calibration import KltCalibration


def print_calibration(console: Console, calibration: ModelCalibration) -> None:
    """Says what a calibration holds and on which texts it was made."""
    header, model = calibration.header, calibration.model
    rows = [
        ("model", f"{header['model_name']}: {model.num_layers} layers, {model.kv_heads} KV heads of {model.head_dim}"),
        *(_describe_klt(header) if calibration.method == "klt" else _describe_codebooks(header)),
        ("samples", f"{header['nsamples']} x {header['seqlen']} tokens, seed {header['seed']}, {header['dtype']}"),
    ]
    if header.get("drawn"):
        rows.append(("drawn", f"{header['drawn']} of {header['nsamples']} samples drawn by the model"))
    for text in header["texts"]:
        first, last = text["tokens_used"]
        seen = f"{text['samples']} samples in tokens {first} to {last - 1} of {text['tokens']}"
        rows.append(("text", f"{text['name']} (sha256 {text['sha256'][:12]}): {seen}"))
    print_table(console, ("calibration", calibration.name), rows)


def _describe_codebooks(header: dict[str, Any]) -> list[tuple[str, str]]:
    weights = header["weights"] + (" times squared half range" if header["times_half_range"] else " (compat)")
    return [
        ("codebooks", f"{', '.join(map(str, header['bits']))} bits, weights {weights}"),
        ("outliers", f"{100 * header['outlier_fraction']:g} % of each vector, {header['sink']} first tokens left out"),
    ]


def _describe_klt(header: dict[str, Any]) -> list[tuple[str, str]]:
    weights = {"fisher": "gradients", "noise": "injected noise, no gradients"}[header["weights"]]
    return [
        ("transforms", f"blocks of {', '.join(map(str, header['blocks']))} heads, for klt of any bits"),
        ("errors weigh", f"{weights}, shrinkage {header['shrinkage']:g}"),
        ("codebooks", f"fitted to at most {header['rows']} tokens, {header['sink']} first tokens left out"),
    ]


def describe_sensitivities(calibration: KltCalibration, policies: list[str]) -> dict[str, Any]:
    """Sensitivities of every layer and kind, and the bits that policies give them.

    Returns:
        {"sensitivities": [{"layer", "kind", "sensitivity"}], "bits": {policy: [{"layer", "kind", "bits"}]}}

    Raises:
        ValueError: an unknown policy, or one that the calibration does not fit.
    """
    from kvpack.calibration_checks import check_calibration
    from kvpack.klt_methods import layer_bits
    from kvpack.policy import parse_policy

    parsed = [parse_policy(policy) for policy in policies]
    for policy in parsed:
        check_calibration(policy, calibration)
    return {
        "sensitivities": calibration.sensitivities(),
        "bits": {policy.name: layer_bits(policy, calibration) for policy in parsed},
    }


def print_sensitivities(console: Console, calibration: KltCalibration, policies: list[str]) -> None:
    """One line a layer: what noise of a fifth of the rms in its keys and in its values costs, and bits they get.

    Raises:
        ValueError: as describe_sensitivities.
    """
    described = describe_sensitivities(calibration, policies)
    columns = ["layer", "keys", "values"]
    cells = {layer: [str(layer), "", ""] for layer in calibration.layers}
    for entry in described["sensitivities"]:
        cells[entry["layer"]][1 if entry["kind"] == "key" else 2] = f"{entry['sensitivity']:.3g}"
    for policy, bits in described["bits"].items():
        columns += [f"{policy}: keys", "values"]
        for row in cells.values():
            row += ["-", "-"]
        for entry in bits:
            cells[entry["layer"]][-2 if entry["kind"] == "key" else -1] = f"{entry['bits']:.2f}"
    print_table(console, columns, cells.values(), right=columns)
    console.print(
        "keys, values: rise of a token's loss, in nats, under noise of 0.2 of their root mean square", markup=False
    )
