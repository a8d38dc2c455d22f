"""How important each neuron is (PyTorch)."""
