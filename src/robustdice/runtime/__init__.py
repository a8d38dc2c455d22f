"""The device side: NumPy, ONNX Runtime and ZeroMQ."""
