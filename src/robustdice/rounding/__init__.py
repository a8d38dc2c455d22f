"""Weights and what a layer sees -> coarse weights."""

ROUNDING_SAMPLES = 256
"""Images that coarse weights are fitted to: of more, the inputs of a filter say hardly more."""
