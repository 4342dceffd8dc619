"""Checkpoints with random weights, for the tests: the suite keeps them in m3e_bench."""

from m3e_bench.checkpoints import SHAPES, random_tensors, vocabulary, write_checkpoint, write_json

__all__ = ["SHAPES", "random_tensors", "vocabulary", "write_checkpoint", "write_json"]
