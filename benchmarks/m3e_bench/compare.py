"""Two records: what changed, and whether that is more than noise and more than allowed."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from m3e import InputError
from m3e_bench.record import Record, Series
from m3e_bench.statistics import STATISTICS, resampled_change

_CONDITION = re.compile(r"(?P<name>[a-z0-9_]+)\s*(?P<sign>[<>])\s*(?P<bound>[+-]?\d+(\.\d+)?)(?P<percent>%?)")
# Percentiles are of waiting times; every other name is a metric, whose median is compared.
_LATENCY = "latency_ms"


@dataclass(frozen=True, slots=True)
class Condition:
    """A change that fails a comparison.

    Attributes:
        text: As it was given.
        metric: Of the series that it is about.
        statistic: Of ``STATISTICS``.
        above: Whether a change above the bound fails, or one below.
        bound: A share of the old value, or an absolute change.
        relative: Which of the two.
    """

    text: str
    metric: str
    statistic: str
    above: bool
    bound: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read ``p95>+5%``, ``sentences_per_s<-5%``, ``cosine_min<-0.001``.

        Raises:
            InputError: It is not of that form.
        """
        match = _CONDITION.fullmatch(text.strip())
        if match is None:
            raise InputError(f'the condition is {text!r}, expected something like "p95>+5%" or "cosine_min<-0.001"')
        percentile = match["name"] in STATISTICS
        return cls(
            text=text,
            metric=_LATENCY if percentile else match["name"],
            statistic=match["name"] if percentile else "median",
            above=match["sign"] == ">",
            bound=float(match["bound"]) / (100 if match["percent"] else 1),
            relative=bool(match["percent"]),
        )


@dataclass(frozen=True, slots=True)
class Change:
    """One figure in both records.

    Attributes:
        series: As it is in the new record.
        statistic: Of the samples.
        old: Value.
        new: Value.
        low: Lower end of the change's 90 % interval, as a share of the old value.
        high: Upper end.
    """

    series: Series
    statistic: str
    old: float
    new: float
    low: float
    high: float

    @property
    def share(self) -> float:
        """New less old, as a share of old."""
        return self.new / self.old - 1 if self.old else float(self.new != self.old)

    @property
    def real(self) -> bool:
        """Whether the interval leaves out no change at all."""
        return self.low > 0 or self.high < 0

    def trips(self, condition: Condition) -> bool:
        """Whether it is beyond the bound and not noise."""
        change = self.share if condition.relative else self.new - self.old
        return (change > condition.bound if condition.above else change < condition.bound) and self.real


@dataclass(frozen=True, slots=True)
class Outcome:
    """A comparison, as text and as what failed."""

    text: str
    failures: tuple[tuple[Condition, Change], ...]


def compare_records(
    old: Record, new: Record, conditions: Sequence[Condition], engines: str = "m3e-*", relative_to: str | None = None
) -> Outcome:
    """Compare the series that both records have.

    Args:
        old: Before.
        new: After.
        conditions: What fails.
        engines: Pattern of the engines that are compared.
        relative_to: Compare ratios to this engine, round by round, instead of values.

    Raises:
        InputError: A condition is about nothing that both records have, so that it could never fail.
    """
    before = {series.key: series for series in _ratios(old, relative_to)}
    pairs = [
        (before[series.key], series)
        for series in _ratios(new, relative_to)
        if series.key in before and fnmatch.fnmatch(series.engine, engines)
    ]
    for condition in conditions:
        if not any(series.metric == condition.metric for _, series in pairs):
            metrics = ", ".join(sorted({series.metric for _, series in pairs})) or "none at all"
            raise InputError(
                f"the condition {condition.text!r} is about nothing that both records have for engines {engines!r}; "
                f"they share {metrics}"
            )
    wanted = {(series.metric, "median") for _, series in pairs if series.metric != _LATENCY}
    wanted |= {(_LATENCY, name) for name in ("p50", "p95")} | {(one.metric, one.statistic) for one in conditions}
    changes = [
        _change(first, second, statistic)
        for first, second in pairs
        for metric, statistic in sorted(wanted)
        if second.metric == metric
    ]
    failures = [
        (condition, change)
        for condition in conditions
        for change in changes
        if (change.series.metric, change.statistic) == (condition.metric, condition.statistic)
        and change.trips(condition)
    ]
    failed = {id(change) for _, change in failures}
    lines = _warnings(old, new)
    lines += [_line(change, id(change) in failed) for change in changes if change.real or id(change) in failed]
    lines.append(
        f"{len(changes)} figures compared, {sum(change.real for change in changes)} changed beyond their noise, "
        f"{len(failed)} failed"
    )
    return Outcome("\n".join(lines), tuple(failures))


def _change(old: Series, new: Series, statistic: str) -> Change:
    compute = STATISTICS[statistic]
    if len(old.flat) == len(new.flat) == 1 and not old.flat[0]:
        low = high = float(new.flat[0] != 0)
    else:
        low, high = resampled_change(old.samples, new.samples, statistic)
    return Change(new, statistic, compute(old.flat), compute(new.flat), low, high)


def _ratios(record: Record, relative_to: str | None) -> list[Series]:
    """The record's series, or each over the series of another engine that measures the same, round by round."""
    if relative_to is None:
        return list(record.series)
    others = {_without_engine(series): series for series in record.series if series.engine == relative_to}
    result = []
    for series in record.series:
        other = others.get(_without_engine(series))
        if other is None or series.better == "neither" or series.question == "accuracy":
            continue
        medians = [STATISTICS["median"](group) for group in other.samples]
        samples = tuple(
            tuple(sample / divisor for sample in group) for group, divisor in zip(series.samples, medians, strict=False)
        )
        result.append(dataclasses.replace(series, unit=f"times {relative_to}", samples=samples))
    return result


def _without_engine(series: Series) -> tuple[str, ...]:
    return (*series.key[:3], series.key[4])


def _warnings(old: Record, new: Record) -> list[str]:
    """Say where the two machines differ in what decides speed."""
    names = ("cpu", "isa", "available_cpus")
    differ = [name for name in names if old.content["machine"][name] != new.content["machine"][name]]
    if old.content["settings"]["threads"] != new.content["settings"]["threads"]:
        differ.append("threads")
    return [f"the records come from different machines ({', '.join(differ)} differ)"] if differ else []


def _line(change: Change, failed: bool) -> str:
    series = change.series
    better = (change.share > 0) == (series.better == "higher")
    verdict = "FAILED" if failed else {True: "better", False: "worse"}[better] if series.better != "neither" else ""
    parameters = " ".join(f"{name}={value}" for name, value in series.parameters.items())
    return (
        f"{verdict:<7} {change.share:+7.1%} [{change.low:+.1%}, {change.high:+.1%}]  {series.model} {series.engine} "
        f"{series.metric} {change.statistic} {change.old:.4g} -> {change.new:.4g} {series.unit}  {parameters}"
    )
