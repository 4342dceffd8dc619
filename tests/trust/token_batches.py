"""Batches of token ids that a tokenizer may or may not give: lengths at every boundary, ids of every distribution."""

from __future__ import annotations

import numpy as np

_EDGES = (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512)
_BATCH_TOKENS = 1024
_SPECIAL = 6  # [PAD], [UNK], [CLS], [SEP], [MASK], [unused1]


def draw(rng: np.random.Generator, vocab_size: int, longest: int = 512) -> list[list[int]]:
    """Draw a batch of 1 to 32 texts, log-uniform, at most 1024 tokens in all."""
    batch: list[list[int]] = []
    left = _BATCH_TOKENS
    equal = int(rng.choice([length for length in _EDGES if length <= longest])) if rng.random() < 0.2 else 0
    for _ in range(int(2 ** rng.uniform(0, 5.01))):
        length = equal or _length(rng, longest)
        if length > left:
            break
        batch.append(_ids(rng, length, vocab_size))
        left -= length
    if len(batch) > 1 and rng.random() < 0.3:
        batch[-1] = list(batch[0])  # a duplicate
    return batch


def _length(rng: np.random.Generator, longest: int) -> int:
    if rng.random() < 0.3:
        return int(rng.choice([length for length in _EDGES if length <= longest]))
    return int(2 ** rng.uniform(1, np.log2(longest)))


def _ids(rng: np.random.Generator, length: int, vocab_size: int) -> list[int]:
    kind = rng.integers(5)
    if kind == 0:
        inner = rng.integers(0, vocab_size, length)
    elif kind == 1:
        inner = np.minimum(rng.zipf(1.3, length), vocab_size - 1)
    elif kind == 2:
        inner = np.full(length, 1)  # all [UNK]
    elif kind == 3:
        inner = np.full(length, rng.integers(vocab_size))
    else:
        inner = rng.integers(0, _SPECIAL, length)  # special tokens in the text, id 0 among them
    return [2, *inner[: length - 2].tolist(), 3]
