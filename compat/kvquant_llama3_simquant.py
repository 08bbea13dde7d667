#!/usr/bin/env python3
"""KVQuant's llama3_simquant: --calibrate writes codebooks to --quantizer_path; without it perplexity is measured."""

import sys

from kvquant_arguments import make_parser, run_script

if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--calibrate", action="store_true", help="write --quantizer_path and stop")
    options = parser.parse_args()
    if options.calibrate and not options.quantizer_path:
        parser.error("--calibrate needs --quantizer_path FILE, the file to write")
    sys.exit(run_script(options, calibrate_only=options.calibrate))
