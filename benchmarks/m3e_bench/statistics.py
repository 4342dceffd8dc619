"""Medians, percentiles, and ratios with the spread that rounds measured side by side allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e_bench.record import Series

STATISTICS: dict[str, Callable[[npt.ArrayLike], float]] = {
    "median": lambda samples: float(np.median(samples)),
    "p50": lambda samples: float(np.percentile(samples, 50)),
    "p95": lambda samples: float(np.percentile(samples, 95)),
    "p99": lambda samples: float(np.percentile(samples, 99)),
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
) -> tuple[float, float, float]:
    """Change of a statistic from old to new, and its interval of 90 % by the bootstrap (Efron 1979).

    Rounds are drawn, not single samples, where there are at least three: what disturbs a machine lasts longer than
    one sample. With a single sample on both sides nothing is known of the noise, and the interval is the change itself.

    Returns:
        New minus old as a share of old: the estimate, the lower and the upper end.
    """
    rng = np.random.default_rng(0)
    compute = STATISTICS[statistic]
    whole = [[np.asarray(group) for group in rounds] for rounds in (old, new)]

    def draw(rounds: list[np.ndarray[Any, Any]]) -> float:
        if len(rounds) >= 3:
            return compute(np.concatenate([rounds[i] for i in rng.integers(0, len(rounds), len(rounds))]))
        flat = np.concatenate(rounds)
        return compute(flat[rng.integers(0, len(flat), len(flat))])

    before, after = (compute(np.concatenate(rounds)) for rounds in whole)
    changes = [draw(whole[1]) / draw(whole[0]) - 1 for _ in range(draws)]
    low, high = np.percentile(changes, [5, 95])
    return after / before - 1, float(low), float(high)
