"""Weights and what a layer sees -> coarse weights."""
