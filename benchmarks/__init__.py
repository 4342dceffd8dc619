"""Measurements; ``python -m benchmarks`` runs the package m3e_bench that lies in this folder."""
