"""Which device holds which neurons (NumPy only)."""
