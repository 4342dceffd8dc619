"""Measurements of the runtime; ``python -m benchmarks.NAME``."""
