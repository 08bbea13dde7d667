#!/usr/bin/env python3
"""The old test_performance.py: test_flatquant.py with --test performance unless told otherwise."""

import sys

from test_flatquant import main

if __name__ == "__main__":
    sys.exit(main("performance"))
