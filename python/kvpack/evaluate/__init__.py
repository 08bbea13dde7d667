"""Measures what a KV cache policy costs a language model in quality."""

from kvpack.evaluate.plan import Plan, Request, prepare
from kvpack.evaluate.run import evaluate, run

__all__ = ["Plan", "Request", "evaluate", "prepare", "run"]
