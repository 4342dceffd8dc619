"""A record -> the cards of the page: a heading, a note, and a chart or a table."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Sequence

from m3e_bench.peers import REFERENCE
from m3e_bench.record import Record, Series
from m3e_bench.report import charts, figures, tables
from m3e_bench.report.charts import Bar
from m3e_bench.report.figures import Row, number
from m3e_bench.statistics import median

_WIDTHS = {"wide": 800, "narrow": 340}


class Cards:
    """The cards of one record, as HTML.

    Args:
        record: What was measured.
        price_per_hour: Of the machine, for what a million texts cost.
    """

    def __init__(self, record: Record, price_per_hour: float) -> None:
        self._record = record
        self._price = price_per_hour
        engines = record.content["engines"]
        ours = [name for name, engine in engines.items() if engine["ours"]]
        peers = [name for name in engines if name not in ours and name != REFERENCE]
        self._kinds = {REFERENCE: "reference"}
        self._kinds |= {name: ("ours" if i == 0 else "ours-2") for i, name in enumerate(ours)}
        self._kinds |= {name: f"peer-{i % 9}" for i, name in enumerate(peers)}

    def of_model(self, name: str) -> str:
        """Everything that was measured with one model."""
        parts = [
            *self._throughput(name), self._lengths(name), *self._latency(name), self._speed_against_accuracy(name),
            *self._tables(name),
            self._one(name, "first_vector_s", "Cold start, s", "s",
                      "From the start of a process to its first vector: imports, loading, checks and one text."),
            self._one(name, "resident_mb", "Memory, MB", "MB", "Resident after both workloads.", after="workloads"),
            *self._scaling(name), *self._bound(name),
        ]  # fmt: skip
        return "".join(parts)

    def by_size(self, models: Sequence[str]) -> str:
        """Throughput over the size of the model; empty where no engine ran with two of them."""
        if len(models) < 2:
            return ""
        content = self._record.content
        workload = figures.values(self._record, "sentences_per_s", "workload", question="throughput")[0]
        curves: dict[str, list[tuple[float, float]]] = {}
        for name in models:
            facts = content["models"][name]
            millions = 12 * facts["layers"] * facts["hidden_size"] ** 2 / 1e6
            for one in self._record.find("sentences_per_s", question="throughput", model=name, workload=workload):
                curves.setdefault(one.engine, []).append((millions, median(one)))
        curves = {engine: sorted(points) for engine, points in curves.items() if len(points) > 1}
        if not curves:
            return ""
        drawn = self._lines(
            curves, "million parameters in the layers", "sentences/s", "Throughput by model size", log_y=True
        )
        return _card(f"Throughput on {workload}", "The models of this record.", drawn)

    def _throughput(self, model: str) -> list[str]:
        cards = []
        for workload in figures.values(self._record, "sentences_per_s", "workload", question="throughput", model=model):
            found = self._record.find("sentences_per_s", question="throughput", model=model, workload=workload)
            source = self._record.content["workloads"].get(workload, {}).get("source", "")
            note = "Sentences a second, texts in and vectors out; × against PyTorch FP32. " + (
                f"Texts: {source}." if source else ""
            )
            drawn = self._bars(figures.rows(self._record, found), "sentences/s", f"Throughput, {workload}")
            cards.append(_card(f"Throughput, {workload}", note, drawn))
        return cards

    def _lengths(self, model: str) -> str:
        curves = figures.curves(self._record, "sentences_per_s", "length_tokens", question="throughput", model=model)
        if not curves:
            return ""
        tokens = {engine: [(x, x * y) for x, y in points] for engine, points in curves.items()}
        drawn = self._lines(tokens, "tokens in a text", "tokens/s", "Throughput by length")
        return _card("Throughput by length", "Tokens a second when all texts have one length; higher is better.", drawn)

    def _latency(self, model: str) -> list[str]:
        cases: dict[str, list[Series]] = {}
        for one in self._record.find("latency_ms", model=model):
            at = one.parameters
            texts = f"{at['batch_size']} text{'s' if at['batch_size'] > 1 else ''} of {at['length_tokens']} tokens"
            loop = f"{at['rate_per_s']} requests a second" if at["loop"] == "open" else "one request after another"
            cases.setdefault(f"Latency, {texts}, {loop}", []).append(one)
        cards = []
        for heading, found in cases.items():
            is_open = found[0].parameters["loop"] == "open"
            note = (
                "Open loop: requests come at random times and are timed from when they were meant to be sent, so that "
                "waiting in line counts. An engine that could not keep up is marked ▲ and understated."
                if is_open
                else "Closed loop. Large dot p50, middle p95, small p99."
            )
            items = []
            for one in sorted(found, key=median):
                answered = self._record.find("answered_share", model=model, engine=one.engine, **one.parameters)
                late = " ▲" if answered and median(answered[0]) < 0.99 else ""
                items.append((self._record.title(one.engine) + late, self._kind(one.engine), one.flat))
            drawn = _both(functools.partial(charts.ridges, items, unit="ms", name=heading))
            cards.append(_card(heading, note, drawn))
        for rate in figures.values(self._record, "processor_ms", "rate_per_s", model=model):
            heading = f"Processor time of a text, {rate} requests a second"
            note = "All threads, also those that wait awake for the next text; lower leaves more to other programs."
            found = self._record.find("processor_ms", model=model, rate_per_s=rate)
            cards.append(_card(heading, note, self._bars(figures.rows(self._record, found), "ms", heading)))
        return cards

    def _speed_against_accuracy(self, model: str) -> str:
        items = []
        workloads = figures.values(self._record, "sentences_per_s", "workload", question="throughput", model=model)
        for one in self._record.find("cosine_mean", model=model, set="corpus"):
            speed = workloads and self._record.find(
                "sentences_per_s", question="throughput", model=model, engine=one.engine, workload=workloads[0]
            )
            if speed and one.engine != one.parameters["reference"]:
                items.append(
                    (self._record.title(one.engine), self._kind(one.engine), 1 - median(one), median(speed[0]))
                )
        if not items:
            return ""
        name = "Speed against accuracy"
        drawn = _both(
            lambda width: charts.scatter(
                items, width, "1 − mean cosine to the FP32 reference (right is nearer)", "sentences/s", name
            )
        )
        note = f"Up is faster ({workloads[0]}), right is nearer to FP32 PyTorch; the upper right corner is where to be."
        return _card(name, note, drawn)

    def _tables(self, model: str) -> list[str]:
        cards = []
        found = tables.accuracy(self._record, model)
        if found:
            note = (
                "Cosines to FP32 PyTorch’s vectors of the same texts; how many of the ten nearest neighbours stay; "
                "correlation with labels, and retrieval, where texts are labelled."
            )
            cards.append(_card("Accuracy", note, found))
        found = tables.cost(self._record, model, self._price)
        if found:
            # The first table's field sets the price for all of them.
            first = model == next(iter(self._record.content["models"]))
            field = tables.price_field(self._price) if first else ""
            cards.append(_card("Cost per million texts", "On a machine that does nothing else.", field + found))
        return cards

    def _one(self, model: str, metric: str, heading: str, unit: str, note: str, **where: str) -> str:
        rows = figures.rows(self._record, self._record.find(metric, model=model, **where))
        return _card(heading, note, self._bars(rows, unit, heading)) if rows else ""

    def _scaling(self, model: str) -> list[str]:
        cards = []
        for parameter, heading, label in (
            ("threads", "Scaling with threads", "threads"),
            ("batch_tokens", "Scaling with the batch", "tokens that a caller brings at once (texts of 32)"),
            ("corpus_texts", "Scaling with the corpus", "texts in one call"),
        ):
            curves = figures.curves(self._record, "sentences_per_s", parameter, question="scaling", model=model)
            if curves:
                cards.append(_card(heading, "Sentences a second.", self._lines(curves, label, "sentences/s", heading)))
        return cards

    def _bound(self, model: str) -> list[str]:
        shares = figures.bound_shares(self._record, model)
        if not shares:
            return []
        bars = [
            Bar(
                f"{self._record.title(engine)}, {workload}", self._kind(engine), share.value, share.low, share.high,
                f"{share.value:.0%} of {number(bound)} tokens/s",
            )
            for workload, engine, bound, share in shares
        ]  # fmt: skip
        drawn = _both(lambda width: charts.bars(bars, width, "of the bound", "Share of the bound"))
        note = (
            "How near m3e comes to its graph’s matrix products alone, in onnxruntime, measured in the same rounds. "
            "Nothing that runs these layers there can pass 100 %."
        )
        cards = [_card("Share of the bound", note, drawn)]
        profiles = [
            (f"{self._record.title(engine)}, {workload}", figures.operators(self._record, model, engine, workload))
            for workload, engine, _, _ in shares
        ]
        profiles = [(title, parts) for title, parts in profiles if parts]
        if profiles:
            name = "Where the time goes"
            drawn = _both(lambda width: charts.stacked(profiles, width, name))
            cards.append(_card(name, "Time in each operator of the graph, by onnxruntime’s profiler.", drawn))
        return cards

    def _bars(self, rows: Sequence[Row], unit: str, name: str) -> str:
        items = [
            Bar(
                row.title, self._kind(row.engine), row.value, row.low, row.high,
                number(row.value) + _times(row),
            )
            for row in rows
        ]  # fmt: skip
        return _both(lambda width: charts.bars(items, width, unit, name))

    def _lines(
        self,
        curves: dict[str, list[tuple[float, float]]],
        x_label: str,
        y_label: str,
        name: str,
        *,
        log_y: bool = False,
    ) -> str:
        kinds = {engine: self._kind(engine) for engine in curves}
        titles = {engine: self._record.title(engine) for engine in curves}
        return _both(lambda width: charts.lines(curves, titles, kinds, width, x_label, y_label, name, log_y=log_y))

    def _kind(self, engine: str) -> str:
        return self._kinds.get(engine, "bound")


def _both(draw: Callable[[int], str]) -> str:
    """A chart for wide pages and one for phones; the style sheet shows one of them."""
    return "".join(f'<div class="{kind}">{draw(width)}</div>' for kind, width in _WIDTHS.items())


def _card(heading: str, note: str, content: str) -> str:
    head = f'<h3>{html.escape(heading)}</h3><p class="note">{html.escape(note)}</p>'
    return f'<section class="card">{head}{content}</section>'


def _times(row: Row) -> str:
    return "" if row.times is None or row.engine == REFERENCE else f"\u2002{row.times.value:.2f}×"
