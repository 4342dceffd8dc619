"""Medians, percentiles, and ratios with the spread that rounds measured side by side allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e_bench.record import Series

_PERCENTS = {"median": 50, "p50": 50, "p95": 95, "p99": 99}
STATISTICS: dict[str, Callable[[npt.ArrayLike], float]] = {
    name: lambda samples, percent=percent: float(np.percentile(samples, percent))  # type: ignore[misc]
    for name, percent in _PERCENTS.items()
}


def median(series: Series) -> float:
    """Median of all samples."""
    return STATISTICS["median"](series.flat)


def spread(series: Series) -> tuple[float, float]:
    """The lowest and the highest median of a round."""
    medians = [STATISTICS["median"](group) for group in series.samples]
    return min(medians), max(medians)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times one series is another: ratio of medians, lowest and highest ratio within a round."""

    value: float
    low: float
    high: float


def ratio(series: Series, to: Series, statistic: str = "median") -> Ratio:
    """Compare two series of one run; the rounds that both have are compared one by one for the spread."""
    compute = STATISTICS[statistic]
    pairs = zip(series.samples, to.samples, strict=False)
    ratios = [compute(mine) / compute(other) for mine, other in pairs]
    return Ratio(compute(series.flat) / compute(to.flat), min(ratios), max(ratios))


def resampled_change(
    old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], statistic: str, draws: int = 400
) -> tuple[float, float]:
    """Interval of 90 % of the change of a statistic from old to new, by the bootstrap (Efron 1979).

    Rounds are drawn, not single samples, where there are at least three: what disturbs a machine lasts longer than
    one sample. With a single sample on both sides nothing is known of the noise, and the interval is the change itself.

    Returns:
        New minus old as a share of old: the lower and the upper end.
    """
    rng = np.random.default_rng(0)
    percent = _PERCENTS[statistic]
    whole = [[np.asarray(group) for group in rounds] for rounds in (old, new)]

    def draw(rounds: list[np.ndarray[Any, Any]]) -> Any:
        if len(rounds) < 3:
            flat = np.concatenate(rounds)
            return np.percentile(flat[rng.integers(0, len(flat), (draws, len(flat)))], percent, axis=1)
        drawn = rng.integers(0, len(rounds), (draws, len(rounds)))
        if len({len(group) for group in rounds}) == 1:
            return np.percentile(np.stack(rounds)[drawn].reshape(draws, -1), percent, axis=1)
        return np.array([np.percentile(np.concatenate([rounds[i] for i in row]), percent) for row in drawn])

    changes = draw(whole[1]) / draw(whole[0]) - 1
    low, high = np.percentile(changes, [5, 95])
    return float(low), float(high)
