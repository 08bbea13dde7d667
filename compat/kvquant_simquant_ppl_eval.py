#!/usr/bin/env python3
"""KVQuant's simquant_ppl_eval: perplexity of MODEL with simulated quantisation of its keys and values."""

import sys

from kvquant_arguments import make_parser, run_script

if __name__ == "__main__":
    sys.exit(run_script(make_parser(__doc__).parse_args()))
