"""A graph on labelled pairs, beside its reference: does it still rank as the original does?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m3e.errors import ExportError
from m3e.manifest import Evaluation

_NEIGHBOURS = 10
_FEWEST_PAIRS = 20
# Rows of a similarity matrix at a time: 8 MB for 4,000 texts.
_BLOCK = 512

Pair = tuple[str, str, float]
Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]


def read_pairs(path: Path) -> list[Pair]:
    """Read ``sentence1<TAB>sentence2<TAB>label`` lines; a first line whose label is no number is a header.

    Raises:
        ExportError: Not readable as UTF-8, a line of another shape, or fewer than 20 pairs.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ExportError(f"the evaluation file {str(path)!r} cannot be read as UTF-8 text: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            first, second, label = line.split("\t")
            pairs.append((first, second, float(label)))
        except ValueError:
            if number == 1:
                continue
            raise ExportError(
                f"line {number} of the evaluation file {str(path)!r} is {line[:60]!r}, "
                "expected sentence1, sentence2 and a numeric label between tabs"
            ) from None
    if len(pairs) < _FEWEST_PAIRS or len({label for *_, label in pairs}) < 2:
        raise ExportError(
            f"the evaluation file {str(path)!r} has {len(pairs)} pairs, expected at least {_FEWEST_PAIRS} "
            "with more than one label"
        )
    return pairs


def distinct(pairs: Sequence[Pair]) -> list[str]:
    """Every text of some pairs once, in order of appearance."""
    return list(dict.fromkeys(text for first, second, _ in pairs for text in (first, second)))


def evaluate(encode: Encode, pairs: Sequence[Pair], expected: npt.NDArray[np.float64]) -> Evaluation:
    """Compare a graph's vectors with the reference's on labelled pairs.

    Args:
        encode: Embeds texts with the graph in question: float32 (n, dim).
        pairs: Two texts and a label; a higher label means more alike.
        expected: The reference's vectors of the distinct texts, float64 (n_texts, dim).
    """
    texts = distinct(pairs)
    row = {text: i for i, text in enumerate(texts)}
    left, right = [row[first] for first, _, _ in pairs], [row[second] for _, second, _ in pairs]
    labels = np.array([label for *_, label in pairs])
    actual = _unit(encode(texts).astype(np.float64))
    reference = _unit(expected)
    return Evaluation(
        n_pairs=len(pairs),
        n_texts=len(texts),
        reference_spearman=spearman((reference[left] * reference[right]).sum(axis=1), labels),
        spearman=spearman((actual[left] * actual[right]).sum(axis=1), labels),
        top10_overlap=neighbour_overlap(actual, reference),
    )


def spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing their mean rank; 0 if all are equal."""
    ranks = _ranks(a), _ranks(b)
    return float(np.corrcoef(*ranks)[0, 1]) if all(np.ptp(each) for each in ranks) else 0.0


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: npt.NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def neighbour_overlap(actual: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> float:
    """Mean share of a text's ten nearest other texts that both sets of unit vectors (n, dim) agree on."""
    n = len(actual)
    count = min(_NEIGHBOURS, n - 1)
    shared = 0
    for start in range(0, n, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, n))
        nearest = []
        for vectors in (actual, reference):
            scores = vectors[rows] @ vectors.T
            scores[np.arange(len(rows)), rows] = -np.inf
            nearest.append(np.argpartition(-scores, count - 1, axis=1)[:, :count])
        shared += sum(len(np.intersect1d(a, b)) for a, b in zip(*nearest, strict=True))
    return shared / (n * count)


def _unit(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    rows: npt.NDArray[np.float64] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return rows
