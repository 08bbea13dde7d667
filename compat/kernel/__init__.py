"""Mustafar's fp16 code base, forwarded to kvpack."""
