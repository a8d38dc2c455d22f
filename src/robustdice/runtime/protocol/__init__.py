"""The protocol of the devices: pure state, events in, actions out."""
