"""Measured throughput, latency and memory."""
