"""Similarity -> probability that two texts mean the same: a monotone map learnt from labelled pairs.

M3E's cosines of unrelated texts lie above 0.8, so no threshold can be guessed. The map is isotonic regression (pool
adjacent violators; Barlow et al., Statistical Inference under Order Restrictions, 1972): no shape is assumed but that
more similarity never means less.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.errors import BundleError, InputError
from m3e.manifest import Manifest

FORMAT_VERSION = 1
_FEWEST_PAIRS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a bundle's side file holds.

    Attributes:
        space_id: Of the vectors that it was learnt on.
        similarity_fn_name: The function whose scores it maps.
        scores: Ascending; between them the map is linear, outside flat.
        probabilities: Share of pairs that mean the same, at each score; never falling.
        precision: What was asked for.
        threshold: The lowest score at and above which the pairs had that precision.
        recall: Share of the pairs that mean the same which the threshold finds.
        n_pairs: How many pairs it was learnt on.
        n_positive: How many of them mean the same.
    """

    space_id: str
    similarity_fn_name: str
    scores: tuple[float, ...]
    probabilities: tuple[float, ...]
    precision: float
    threshold: float
    recall: float
    n_pairs: int
    n_positive: int

    def __call__(self, scores: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Map scores of any shape to probabilities, float32."""
        mapped = np.interp(np.asarray(scores, dtype=np.float64), self.scores, self.probabilities)
        return np.asarray(mapped, dtype=np.float32)

    def to_bytes(self) -> bytes:
        """Serialise to JSON that carries its own hash."""
        content = {**dataclasses.asdict(self), "format_version": FORMAT_VERSION}
        return _canonical({**content, "sha256": hashlib.sha256(_canonical(content)).hexdigest()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Calibration:
        """Read what `to_bytes` wrote.

        Raises:
            BundleError: Another version, or a changed byte.
        """
        again = "calibrate again with 'm3e calibrate'"
        try:
            content = json.loads(data)
            version, declared = content.pop("format_version"), content.pop("sha256")
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
            raise BundleError(f"the calibration cannot be read ({error}); {again}") from error
        if version != FORMAT_VERSION:
            raise BundleError(f"the calibration has version {version!r}, this m3e reads {FORMAT_VERSION}; {again}")
        whole = {**content, "format_version": version}
        if hashlib.sha256(_canonical(whole)).hexdigest() != declared or set(content) != set(typing.get_type_hints(cls)):
            raise BundleError(f"the calibration does not match its own hash: it was edited or damaged; {again}")
        content["scores"], content["probabilities"] = tuple(content["scores"]), tuple(content["probabilities"])
        return cls(**content)


def load_calibration(data: bytes | None, manifest: Manifest) -> Calibration | None:
    """Read a bundle's side file, if it has one.

    Raises:
        BundleError: It is damaged, or was learnt on another bundle's vectors.
    """
    if data is None:
        return None
    calibration = Calibration.from_bytes(data)
    learnt, here = (
        (calibration.space_id, calibration.similarity_fn_name),
        (manifest.space_id, manifest.model.similarity_fn_name),
    )
    if learnt != here:
        raise BundleError(f"the calibration is of {' '.join(learnt)} and the bundle is {' '.join(here)}; remove "
                          "similarity.json, or calibrate again with 'm3e calibrate'")  # fmt: skip
    return calibration


def fit(
    scores: npt.ArrayLike, labels: Sequence[bool] | npt.ArrayLike, *, precision: float, space_id: str,
    similarity_fn_name: str,
) -> Calibration:  # fmt: skip
    """Learn the map and the threshold.

    Args:
        scores: (n,), the similarity of each pair.
        labels: (n,), whether the pair means the same.
        precision: Share of the pairs at and above the threshold that shall mean the same, above 0 and at most 1.
        space_id: Of the vectors.
        similarity_fn_name: The function that gave the scores.

    Returns:
        The calibration.

    Raises:
        InputError: Too few pairs, pairs of one kind only, or no threshold has the precision.
    """
    x = np.asarray(scores, dtype=np.float64)
    y = np.asarray(labels, dtype=np.bool_)
    if not 0 < precision <= 1:
        raise InputError(f"precision is {precision}, expected above 0 and at most 1")
    if len(x) < _FEWEST_PAIRS or y.all() or not y.any():
        raise InputError(f"{len(x)} pairs, {int(y.sum())} of them positive; expected at least {_FEWEST_PAIRS} pairs of "
                         "both kinds")  # fmt: skip
    knots, values = _isotonic(x, y)
    threshold, recall = _threshold(x, y, precision)
    return Calibration(
        space_id=space_id,
        similarity_fn_name=similarity_fn_name,
        scores=tuple(knots),
        probabilities=tuple(values),
        precision=precision,
        threshold=threshold,
        recall=recall,
        n_pairs=len(x),
        n_positive=int(y.sum()),
    )


def _isotonic(x: npt.NDArray[np.float64], y: npt.NDArray[np.bool_]) -> tuple[list[float], list[float]]:
    """Pool adjacent violators, then keep the ends of each flat piece."""
    distinct, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=y) / counts
    blocks: list[list[float]] = []  # weight, mean, first score, last score
    for score, mean, count in zip(distinct.tolist(), means.tolist(), counts.tolist(), strict=True):
        blocks.append([count, mean, score, score])
        while len(blocks) > 1 and blocks[-2][1] >= blocks[-1][1]:
            weight, mean, _, last = blocks.pop()
            total = blocks[-1][0] + weight
            blocks[-1] = [total, (blocks[-1][0] * blocks[-1][1] + weight * mean) / total, blocks[-1][2], last]
    knots, values = [], []
    for _, mean, first, last in blocks:
        knots += [first] if first == last else [first, last]
        values += [mean] if first == last else [mean, mean]
    return knots, values


def _threshold(x: npt.NDArray[np.float64], y: npt.NDArray[np.bool_], precision: float) -> tuple[float, float]:
    """Find the lowest score whose pairs, with all above, have the precision. Equal scores stay together."""
    order = np.argsort(-x, kind="stable")
    found = np.cumsum(y[order])
    reached = found / np.arange(1, len(x) + 1)
    last_of_score = np.append(x[order][1:] != x[order][:-1], True)
    good = np.flatnonzero((reached >= precision) & last_of_score)
    if not len(good):
        best = float(reached[last_of_score].max())
        raise InputError(f"no threshold gives a precision of {precision} on these pairs, the best is {best:.3f}")
    return float(x[order][good[-1]]), float(found[good[-1]] / y.sum())


def _canonical(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
