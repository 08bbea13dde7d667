"""`python -m kvpack` is the command kvpack."""

from kvpack.cli import main

main()
