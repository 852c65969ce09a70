"""Measurements, beside the tests: `python -m benchmarks.NAME` prints JSON lines."""
