#!/usr/bin/env python3
"""The old test_accuracy.py: test_flatquant.py with --test accuracy unless told otherwise."""

import sys

from test_flatquant import main

if __name__ == "__main__":
    sys.exit(main("accuracy"))
