"""What accuracy is left under failures (PyTorch)."""
