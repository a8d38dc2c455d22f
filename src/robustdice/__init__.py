"""Run a pretrained CNN on unreliable edge devices, so that answers keep coming while devices fail."""
