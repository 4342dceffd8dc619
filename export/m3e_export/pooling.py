"""Tokens -> a sentence's vector in numpy, one text at a time.

`pooling_graph` does the same in a graph, for a batch. The poolings are sentence-transformers' (sentence_transformers:
sentence_transformer/modules/pooling.py) and uniem's (uniem: uniem/model.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e_export.checkpoint import Checkpoint
from m3e_export.encoder_math import FUNCTIONS
from m3e_export.modules import DENSE_ACTIVATIONS, Dense

Array = npt.NDArray[Any]

# Of the last layer's tokens (n, hidden) and the tokens' positions in the text, which count from 1.
_OF_LAST: dict[str, Callable[[Array, Array], Array]] = {
    "cls": lambda tokens, positions: tokens[0],
    "lasttoken": lambda tokens, positions: tokens[-1],
    "max": lambda tokens, positions: tokens.max(axis=0),
    "mean": lambda tokens, positions: tokens.mean(axis=0),
    "mean_sqrt_len_tokens": lambda tokens, positions: tokens.sum(axis=0) / np.sqrt(len(tokens)),
    "weightedmean": lambda tokens, positions: positions @ tokens / positions.sum(),
}
# The other value whose mean is averaged with the last layer's mean.
AVERAGED = {"first_last_mean": "first", "embedding_last_mean": "words"}


def embed_sentence(checkpoint: Checkpoint, words: Array, first: Array, last: Array) -> Array:
    """Pool one text's tokens and put them through the checkpoint's head.

    Args:
        checkpoint: The model.
        words: Word embeddings, (n_tokens, embedding_size).
        first: The embeddings, normalised: what goes into the first layer, (n_tokens, hidden).
        last: The last layer's output, (n_tokens, hidden).

    Returns:
        (embedding_dim,), in the arguments' precision.
    """
    positions = np.arange(1, len(last) + 1, dtype=last.dtype)
    parts = []
    for pooling in checkpoint.pooling:
        if pooling in AVERAGED:
            other = {"first": first, "words": words}[AVERAGED[pooling]]
            parts.append((other.mean(axis=0) + last.mean(axis=0)) / 2)
        else:
            parts.append(_OF_LAST[pooling](last, positions))
    vector: Array = np.concatenate(parts)
    for module in checkpoint.head:
        if isinstance(module, Dense):
            vector = module.weight.astype(vector.dtype) @ vector
            if module.bias is not None:
                vector = vector + module.bias
            vector = FUNCTIONS[DENSE_ACTIVATIONS[module.activation]](vector)
        else:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return vector
