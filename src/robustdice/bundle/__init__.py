"""One self-contained directory per device: written by the workshop, read by the device."""
