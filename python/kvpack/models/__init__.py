"""The adapter to transformers models: loading them, and simulating compression inside them. Needs torch."""
