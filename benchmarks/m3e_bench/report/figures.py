"""A record -> the figures that the page and the Markdown show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from m3e_bench.peers import REFERENCE
from m3e_bench.record import Record, Series
from m3e_bench.statistics import STATISTICS, Ratio, median, ratio, spread

# Metrics of accuracy and their names for people, in the order of the tables' columns.
ACCURACY = {
    "cosine_mean": "mean cosine", "cosine_p1": "p1", "cosine_min": "min", "top10_overlap": "top-10 overlap",
    "spearman": "Spearman", "ndcg_at_10": "nDCG@10",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One engine's figure.

    Attributes:
        engine: Its name.
        title: Its name for people.
        ours: Whether it is m3e.
        value: Median.
        low: Lowest median of a round.
        high: Highest median of a round.
        times: Ratio to the reference, where both were measured.
    """

    engine: str
    title: str
    ours: bool
    value: float
    low: float
    high: float
    times: Ratio | None


def rows(record: Record, found: Iterable[Series]) -> list[Row]:
    """One row for each series, the best first."""
    series = list(found)
    reference = next((one for one in series if one.engine == REFERENCE), None)
    result = [
        Row(
            one.engine, record.title(one.engine), is_ours(record, one.engine), median(one), *spread(one),
            None if reference is None else ratio(one, reference),
        )
        for one in series
    ]  # fmt: skip
    higher = bool(series) and series[0].better == "higher"
    return sorted(result, key=lambda row: -row.value if higher else row.value)


def is_ours(record: Record, engine: str) -> bool:
    """Whether an engine is m3e."""
    return bool(record.content["engines"].get(engine, {}).get("ours", False))


def values(record: Record, metric: str, parameter: str, **where: Any) -> list[Any]:
    """The values that a parameter takes over the series of a metric, in order of appearance."""
    found = record.find(metric, **where)
    return list(dict.fromkeys(one.parameters[parameter] for one in found if parameter in one.parameters))


def curves(record: Record, metric: str, parameter: str, **where: Any) -> dict[str, list[tuple[float, float]]]:
    """For each engine the points (parameter, median)."""
    result: dict[str, list[tuple[float, float]]] = {}
    for one in record.find(metric, **where):
        if parameter in one.parameters:
            result.setdefault(one.engine, []).append((float(one.parameters[parameter]), median(one)))
    return {engine: sorted(points) for engine, points in result.items()}


def bound_shares(record: Record, model: str) -> list[tuple[str, str, float, Ratio]]:
    """Ours against its matrix products alone: workload, engine, tokens a second of the bound, share of it."""
    result = []
    for one in record.find("tokens_per_s", model=model):
        if is_ours(record, one.engine):
            precision = record.content["engines"][one.engine]["precision"]
            bound = record.find("tokens_per_s", model=model, engine=f"gemm-{precision}", **one.parameters)
            if bound:
                result.append((one.parameters["workload"], one.engine, median(bound[0]), ratio(one, bound[0])))
    return result


def operators(record: Record, model: str, engine: str, workload: str) -> list[tuple[str, float]]:
    """Share of each operator type in the graph's time, the largest first."""
    found = record.find("operator_s", model=model, engine=engine, workload=workload)
    total = sum(median(one) for one in found) or 1.0
    return sorted(((one.parameters["operator"], median(one) / total) for one in found), key=lambda item: -item[1])


def percentiles(series: Series) -> dict[str, float]:
    """p50, p95 and p99 of all samples."""
    return {name: STATISTICS[name](series.flat) for name in ("p50", "p95", "p99")}


def cost_per_million(sentences_per_s: float, price_per_hour: float) -> float:
    """Price of a million texts on a machine that does nothing else."""
    return 1e6 / sentences_per_s / 3600 * price_per_hour


def accuracy(record: Record, model: str, name: str) -> dict[str, dict[str, float]]:
    """Every accuracy figure on a set: engine -> metric -> value; engines in the record's order."""
    found: dict[str, dict[str, float]] = {engine: {} for engine in record.content["engines"]}
    for one in record.series:
        if one.question == "accuracy" and one.model == model and one.parameters["set"] == name and one.engine in found:
            found[one.engine][one.metric] = median(one)
    return {engine: metrics for engine, metrics in found.items() if metrics}


def number(value: float) -> str:
    """Three figures that count, with thousands separated."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def times(value: Ratio | None) -> str:
    """A ratio with the spread over the rounds."""
    return "" if value is None else f"{value.value:.2f}× ({value.low:.2f}–{value.high:.2f})"
