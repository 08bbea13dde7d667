"""Calibration: what codebook methods know of a model before they see a text, and the file that keeps it.

Made by `kvpack calibrate MODEL -o FILE`, or here:

    from kvpack.calibrate import Calibration, calibrate

    calibrate("path/to/model", "model.safetensors", bits=(2, 3))         # runs the model; Request has every option
    calibration = Calibration.load("model.safetensors")                  # checked as if it came from an enemy
    calibration.check_model(model)                                       # refuses a file made for other weights

    codebook = calibration.codebook(layer=0, kind="key", bits=3)         # float32 [8], ascending, within [-1, 1]
    lower, upper = calibration.thresholds(layer=0, kind="key")           # float32 [channels] each, of float16 values
    scale, offset = calibration.norm(layer=0, kind="key", bits=3)        # Q-Norm of that codebook

Layers are the model's own numbers; kinds are "key" (output of k_proj, before RoPE) and "value" (output of v_proj);
channels are those of all KV heads of a layer. Centroids are in normalised units: keys by the range of their channel
(the thresholds), values by the range of their token. A layer, kind or bit width that the file lacks is a
CalibrationError (a ValueError) that names it and what there is. `calibration.require(bits)` asks for all at once,
before weights are loaded.

`calibration.header` says how the file was made (docs/calibration.md); `.outlier_fraction` is the share of each vector
that its thresholds leave outside, `.sink` how many first tokens of a sample it left out; `.used_tokens(sha256)` says
which tokens of a text it has seen, so that nobody measures on them.

Who does what: files.py reads and writes, fingerprint.py tells models apart, plan.py checks a request, draw.py lets the
model write samples, collect.py runs it over all samples, spool.py keeps what it saw on disk, fit.py turns that into
codebooks, run.py goes through all of it.
"""

from kvpack.calibrate.base import CalibrationError, ModelCalibration
from kvpack.calibrate.calibration import Calibration
from kvpack.calibrate.files import load_any_calibration
from kvpack.calibrate.klt_calibration import KltCalibration
from kvpack.calibrate.plan import Plan, Request, prepare
from kvpack.calibrate.run import calibrate, run

__all__ = [
    "Calibration",
    "CalibrationError",
    "KltCalibration",
    "ModelCalibration",
    "Plan",
    "Request",
    "calibrate",
    "load_any_calibration",
    "prepare",
    "run",
]
