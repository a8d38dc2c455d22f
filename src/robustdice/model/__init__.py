"""Model and image sources, and the graph of layers, tails and exchanges (PyTorch)."""
