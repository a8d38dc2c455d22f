"""What a plan costs in seconds and bytes: counted, measured on a device, and modelled from both (NumPy only)."""
