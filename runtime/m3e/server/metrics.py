"""Counts of the service, shown to Prometheus under our names and under TEI's, so that its dashboards go on working.

Plain integers, written by the event loop and the batching threads; every series exists, as zero, from the start.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

# TEI's buckets (router/src/prometheus.rs): 35 durations from 15 us, each 1.5 times the last; sizes are powers of two.
_SECONDS = tuple(1.5e-5 * 1.5**i for i in range(35))
_SIZES = tuple(float(2**i) for i in range(20))

# Our code of a problem -> TEI's word for it.
_TEI_FAILURES = {
    "server_is_overloaded": "overloaded",
    "array_above_max_length": "batch_size",
    "inference_failed": "inference",
    "internal_error": "inference",
    "deadline_exceeded": "dropped",
}
_TEI_WORDS = ("validation", "batch_size", "tokenization", "inference", "overloaded", "dropped", "model_type")


class Distribution:
    """A histogram: counts by bucket, and the sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def family(self, name: str, help_: str) -> HistogramMetricFamily:
        """As Prometheus wants it: cumulative, the last bucket without bound."""
        buckets, running = [], 0
        for bound, count in zip([*map(repr, self.bounds), "+Inf"], self.counts, strict=True):
            running += count
            buckets.append((bound, running))
        return HistogramMetricFamily(name, help_, buckets=buckets, sum_value=self.total)


class Metrics(Collector):
    """Everything counted.

    Args:
        routes: Templates of all routes; any other path counts as ``unmatched``, so the series are finite.
        codes: Codes of all problems.
        gauges: Name -> what it is and a function that reads it now.
    """

    def __init__(
        self, routes: Iterable[str], codes: Iterable[str], gauges: dict[str, tuple[str, Callable[[], float]]]
    ) -> None:
        self.requests = {(route, kind): 0 for route in [*routes, "unmatched"] for kind in ("2xx", "4xx", "5xx")}
        self.problems = dict.fromkeys(codes, 0)
        self.singles = self.batches = 0
        self.singles_ok = self.batches_ok = 0
        self.texts = self.truncated_texts = 0
        self.reloads = {"swapped": 0, "refused": 0}
        self.duration, self.tokenization, self.queue, self.inference = (Distribution(_SECONDS) for _ in range(4))
        self.input_tokens, self.batch_texts, self.batch_tokens = (Distribution(_SIZES) for _ in range(3))
        self._gauges = gauges
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def observe_batch(self, n_texts: int, n_tokens: int, seconds: float) -> None:
        """Count a batch that ran."""
        self.batch_texts.add(n_texts)
        self.batch_tokens.add(n_tokens)

    def text(self) -> bytes:
        """The page at /metrics."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Give every family; the Prometheus client calls this."""
        yield _counter("m3e_requests", "Answers by route and class of status.", ("route", "status"), self.requests)
        yield _counter("m3e_problems", "Refusals and failures by code.", ("code",), self.problems)
        yield _counter("m3e_texts", "Texts embedded.", (), {(): self.texts})
        yield _counter("m3e_truncated_texts", "Texts that were cut.", (), {(): self.truncated_texts})
        yield _counter("m3e_reloads", "Bundles opened again while serving.", ("result",), self.reloads)
        for name, distribution, help_ in (
            ("m3e_request_seconds", self.duration, "From the whole request to its answer."),
            ("m3e_tokenization_seconds", self.tokenization, "Of a request."),
            ("m3e_queue_seconds", self.queue, "Of a request, until its first batch."),
            ("m3e_inference_seconds", self.inference, "Of a request, from its first batch to its last."),
            ("m3e_text_tokens", self.input_tokens, "Tokens of a text, as embedded."),
            ("m3e_batch_texts", self.batch_texts, "Texts of a batch."),
            ("m3e_batch_tokens", self.batch_tokens, "Tokens of a batch."),
        ):
            yield distribution.family(name, help_)
        for name, (help_, read) in self._gauges.items():
            yield GaugeMetricFamily(name, help_, value=read())
        yield from self._tei()

    def _tei(self) -> Iterable[Metric]:
        failures = dict.fromkeys(_TEI_WORDS, 0)
        for code, count in self.problems.items():
            failures[_TEI_FAILURES.get(code, "validation")] += count
        n, ok = self.singles + self.batches, self.singles_ok + self.batches_ok
        yield _plain("te_request_count", ("method",), {"single": self.singles, "batch": self.batches})
        yield _plain("te_request_success", ("method",), {"single": self.singles_ok, "batch": self.batches_ok})
        yield _plain("te_request_failure", ("err",), failures)
        yield _plain("te_embed_count", (), {(): n})
        yield _plain("te_embed_success", (), {(): ok})
        for prefix in ("te_request", "te_embed"):
            for name, distribution in (
                ("duration", self.duration),
                ("tokenization_duration", self.tokenization),
                ("queue_duration", self.queue),
                ("inference_duration", self.inference),
            ):
                yield distribution.family(f"{prefix}_{name}", "TEI's name.")
        yield self.input_tokens.family("te_request_input_length", "TEI's name.")
        yield self.batch_texts.family("te_batch_next_size", "TEI's name.")
        yield self.batch_tokens.family("te_batch_next_tokens", "TEI's name.")
        yield GaugeMetricFamily("te_queue_size", "TEI's name.", value=self._gauges["m3e_queue_requests"][1]())


def _counter(name: str, help_: str, labels: tuple[str, ...], values: Mapping[Any, int]) -> Metric:
    metric = Metric(name, help_, "counter")
    for key, value in values.items():
        metric.add_sample(f"{name}_total", _labels(labels, key), value)
    return metric


def _plain(name: str, labels: tuple[str, ...], values: Mapping[Any, int]) -> Metric:
    """A counter without the suffix that Prometheus asks for: TEI's have none."""
    metric = Metric(name, "TEI's name.", "unknown")
    for key, value in values.items():
        metric.add_sample(name, _labels(labels, key), value)
    return metric


def _labels(names: tuple[str, ...], key: str | tuple[str, ...]) -> dict[str, str]:
    return dict(zip(names, (key,) if isinstance(key, str) else key, strict=True))
