"""Tasks from local texts: similarity and retrieval, as plain data for the process that has mteb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from m3e_bench.workloads import Pairs, labelled_pairs
from m3e_export.texts import corpus


def local_tasks(data: Path | None, language: str, limit: int | None) -> list[dict[str, Any]]:
    """Make one similarity task and one retrieval task of every labelled set, or of the exporter's corpus.

    Args:
        data: Folder of public sets, or None.
        language: ``zh`` or ``en``.
        limit: Pairs of a set; None for all.
    """
    tasks: list[dict[str, Any]] = []
    for pairs in labelled_pairs(data, language, limit) or [_from_corpus(language, limit or 200)]:
        alike = [i for i, score in enumerate(pairs.scores) if score >= (1 if "lcqmc" in pairs.name else 4)]
        tasks += [
            {
                "name": f"{pairs.name}-sts", "kind": "sts", "language": language,
                "left": pairs.left, "right": pairs.right, "scores": pairs.scores,
            },
            {
                "name": f"{pairs.name}-retrieval", "kind": "retrieval", "language": language,
                "queries": {f"q{i}": pairs.left[i] for i in alike},
                "corpus": {f"d{i}": text for i, text in enumerate(pairs.right)},
                "relevant": {f"q{i}": {f"d{i}": 1} for i in alike},
            },
        ]  # fmt: skip
    return tasks


def _from_corpus(language: str, count: int) -> Pairs:
    """Pairs that share more or less of a sentence; the label, 0 to 5, is the share of words that is kept."""
    rng = np.random.default_rng(0)
    lines = [line for line in corpus(language) if 12 <= len(line) <= 120]
    left = [str(line) for line in rng.choice(lines, count, replace=False)]
    right, scores = [], []
    for i, line in enumerate(left):
        units = list(line) if language == "zh" else line.split()
        other = list(left[i - 1]) if language == "zh" else left[i - 1].split()
        score = int(rng.integers(0, 6))
        kept = round(len(units) * score / 5)
        separator = "" if language == "zh" else " "
        right.append(separator.join(units[:kept] + other[: len(units) - kept]) or line)
        scores.append(float(score))
    return Pairs(f"corpus-{language}", tuple(left), tuple(right), tuple(scores))
