"""How far the vectors of two encoders are apart, and what mixing them does to a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from m3e.encoder import Encoder
from m3e.errors import InputError
from m3e.vectors import Float32Array

N_NEIGHBOURS = 10
_ROWS = 1024  # queries scored at once: 1024 x 100,000 texts are 400 MB


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two encoders on the same texts.

    Attributes:
        same_space: Whether the bundles' ``space_id`` are equal: whether their vectors may be mixed.
        n_texts: Texts that were embedded with both.
        mean_cosine: Between a text's two vectors; None where their dimensions differ.
        min_cosine: The worst text's.
        worst_text: That text.
        neighbour_overlap: The share of a text's ten nearest texts that it keeps when it is embedded with the first
            encoder and all others with the second; None for fewer than twelve texts or where dimensions differ.
    """

    same_space: bool
    n_texts: int
    mean_cosine: float | None
    min_cosine: float | None
    worst_text: str | None
    neighbour_overlap: float | None


def compare(first: Encoder, second: Encoder, texts: Sequence[str]) -> Comparison:
    """Embed texts with both encoders, without prompts, and compare.

    Args:
        first: Whose vectors are the queries, and what the overlap is measured against.
        second: Whose vectors are what is searched when the two are mixed.
        texts: At least one; doubles are left out.

    Raises:
        InputError: No texts.
    """
    texts = list(dict.fromkeys(texts))
    if not texts:
        raise InputError("there are no texts to compare on")
    same_space = first.space_id == second.space_id
    a, b = (encoder.encode(texts, prompt="", normalize_embeddings=True) for encoder in (first, second))
    if a.shape != b.shape:
        return Comparison(same_space, len(texts), None, None, None, None)
    cosines = np.einsum("nd,nd->n", a, b)
    worst = int(cosines.argmin())
    return Comparison(
        same_space=same_space,
        n_texts=len(texts),
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines[worst]),
        worst_text=texts[worst],
        neighbour_overlap=_overlap(a, b) if len(texts) >= N_NEIGHBOURS + 2 else None,
    )


def _overlap(a: Float32Array, b: Float32Array) -> float:
    """Mean share of the nearest rows of a that stay nearest when the searched rows are b's."""
    kept = 0
    for start in range(0, len(a), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(a)))
        own, mixed = _nearest(a[rows], a, rows), _nearest(a[rows], b, rows)
        kept += int((own[:, :, None] == mixed[:, None, :]).sum())
    return kept / (len(a) * N_NEIGHBOURS)


def _nearest(queries: Float32Array, searched: Float32Array, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Indices of the nearest rows, the query's own left out: (n, 10), in no order."""
    scores = queries @ searched.T
    scores[np.arange(len(rows)), rows] = -np.inf
    return np.argpartition(scores, -N_NEIGHBOURS, axis=1)[:, -N_NEIGHBOURS:]
