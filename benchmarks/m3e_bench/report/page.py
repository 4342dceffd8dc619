"""A record as one HTML page that needs nothing else: no network, no fonts, a few lines of script for the price."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Sequence
from importlib import resources

from m3e_bench.peers import REFERENCE
from m3e_bench.record import Record, Series
from m3e_bench.report import charts, figures, tables
from m3e_bench.report.charts import Bar
from m3e_bench.report.figures import Row, number
from m3e_bench.statistics import median, ratio

_WIDTHS = {"wide": 800, "narrow": 340}

_SCRIPT = """
const price = document.getElementById("price");
function show() {
  for (const cell of document.querySelectorAll("[data-rate]"))
    cell.textContent = (1e6 / cell.dataset.rate / 3600 * price.value).toFixed(4);
}
if (price) { price.addEventListener("input", show); show(); }
"""


def render_page(record: Record, price_per_hour: float) -> str:
    """Lay a record out as a page."""
    page = _Page(record, price_per_hour)
    css = resources.files("m3e_bench.report").joinpath("page.css").read_text("utf-8")
    speed = [name for name in record.content["models"] if record.find("sentences_per_s", model=name)]
    others = [name for name in record.content["models"] if name not in speed]
    models = [page.model(name) for name in speed + others]
    body = [page.head(speed), *models, page.sizes(speed), tables.engines(record), page.method()]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>m3e against its peers</title><style>{css}</style></head>\n"
        f"<body><main>{''.join(body)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


class _Page:
    """The parts of the page, each as HTML."""

    def __init__(self, record: Record, price_per_hour: float) -> None:
        self._record = record
        self._price = price_per_hour
        engines = record.content["engines"]
        ours = [name for name, engine in engines.items() if engine["ours"]]
        peers = [name for name in engines if name not in ours and name != REFERENCE]
        self._kinds = {REFERENCE: "reference"}
        self._kinds |= {name: ("ours" if i == 0 else "ours-2") for i, name in enumerate(ours)}
        self._kinds |= {name: f"peer-{i % 9}" for i, name in enumerate(peers)}
        self._titles = {name: engine["title"] for name, engine in engines.items()}

    def head(self, models: Sequence[str]) -> str:
        """Title, machine, and the few figures that a hurried reader wants."""
        content, machine = self._record.content, self._record.content["machine"]
        isa = ", ".join(
            name for name in machine["isa"] if name.startswith(("avx2", "avx_", "avx512", "amx", "asimddp", "i8mm"))
        )
        facts = (
            f"{machine['cpu']} ({isa or machine['architecture']}), {content['settings']['threads']} threads for every "
            f"engine, {machine['memory_bytes'] / 1e9:.0f} GB. {content['created'][:10]}, m3e-runtime "
            f"{content['code']['version']}, commit {(content['code']['commit'] or 'none')[:10]}."
        )
        links = "".join(f'<a href="#{_id(name)}">{html.escape(name)}</a>' for name in content["models"])
        tiles = "".join(self._tile(*tile) for name in models[:1] for tile in self._tiles(name))
        return (
            f"<h1>m3e against its peers</h1><p class=soft>{html.escape(facts)}</p>"
            f'<nav>{links}<a href="#engines">Engines</a><a href="#method">Method</a></nav>'
            f'<div class="tiles">{tiles}</div>'
        )

    def model(self, name: str) -> str:
        """Everything about one model."""
        facts = self._record.content["models"][name]
        intro = f"{facts['layers']} layers × {facts['hidden_size']}, {facts['weights']} weights"
        parts = [
            *self._throughput(name), self._lengths(name), *self._latency(name), self._speed_against_accuracy(name),
            *self._tables(name),
            self._one(name, "first_vector_s", "Cold start, s", "s",
                      "From the start of a process to its first vector: imports, loading, checks and one text."),
            self._one(name, "resident_mb", "Memory, MB", "MB", "Resident after both workloads.", after="workloads"),
            *self._scaling(name), *self._bound(name),
        ]  # fmt: skip
        return f'<h2 id="{_id(name)}">{html.escape(name)}</h2><p class=soft>{intro}</p>{"".join(parts)}'

    def sizes(self, models: Sequence[str]) -> str:
        """Throughput over the size of the model."""
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
        return "<h2>Model size</h2>" + _card(f"Throughput on {workload}", "The models of this record.", drawn)

    def method(self) -> str:
        """How the figures came about."""
        content = self._record.content
        workloads = "".join(
            f"<li><b>{html.escape(name)}</b>: {one['texts']} texts, {html.escape(one['source'])}</li>"
            for name, one in content["workloads"].items()
        )
        budget = content["settings"]["budget"]
        return (
            '<h2 id="method">Method</h2><section class="card"><p>Every engine gets the same checkpoint, texts and '
            "threads and runs in a process of its own, which is stopped while another has its turn. The engines take "
            f"turns (A B C, C B A, …) for {budget['rounds']} rounds after a warm-up. Bars are medians; whiskers reach "
            "from the slowest to the fastest round. A ratio is one of medians, round by round alike: what slows a "
            "machine down falls on all engines of a round, so ratios hold where seconds do not. "
            "Tokenising is included everywhere.</p>"
            f"<ul>{workloads}</ul><p class=note>{content['seconds'] / 60:.0f} minutes of measurements. The record "
            "beside this page has every sample, versions, and hashes of models and data.</p></section>"
            "<footer>Made by the m3e benchmark suite from one record.</footer>"
        )

    def _tiles(self, model: str) -> list[tuple[str, str]]:
        best = next((name for name, kind in self._kinds.items() if kind == "ours"), "")
        tiles = []
        found = self._record.find("sentences_per_s", question="throughput", model=model)
        workloads = [one for one in found if one.engine == best and "workload" in one.parameters]
        if workloads:
            workload = workloads[0].parameters["workload"]
            tiles.append(
                (number(median(workloads[0])), f"sentences a second, {model}, {workload}, {self._titles[best]}")
            )
            against = next(
                (one for one in found if one.engine == REFERENCE and one.parameters == workloads[0].parameters), None
            )
            if against is not None:
                tiles.append(
                    (
                        f"{ratio(workloads[0], against).value:.1f}×",
                        f"the speed of sentence-transformers on PyTorch FP32, {workload}",
                    )
                )
        cosine = self._record.find("cosine_mean", model=model, engine=best)
        if cosine:
            tiles.append((f"{median(cosine[0]):.5f}", "mean cosine to FP32 PyTorch’s vectors"))
        waits = self._record.find("latency_ms", model=model, engine=best, loop="closed", batch_size=1, length_tokens=12)
        if waits:
            tiles.append((f"{figures.percentiles(waits[0])['p50']:.1f} ms", "median wait for one text of 12 tokens"))
        for metric, unit, label in (
            ("first_vector_s", "s", "from process start to the first vector"),
            ("resident_mb", "MB", "resident after both workloads"),
        ):
            where = {"after": "workloads"} if metric == "resident_mb" else {}
            one = self._record.find(metric, model=model, engine=best, **where)
            if one:
                tiles.append((f"{number(median(one[0]))} {unit}", label))
        return tiles

    def _tile(self, value: str, label: str) -> str:
        return f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'

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
                items.append((self._titles.get(one.engine, one.engine) + late, self._kind(one.engine), one.flat))
            drawn = _both(functools.partial(charts.ridges, items, unit="ms", name=heading))
            cards.append(_card(heading, note, drawn))
        return cards

    def _speed_against_accuracy(self, model: str) -> str:
        items = []
        workloads = figures.values(self._record, "sentences_per_s", "workload", question="throughput", model=model)
        for one in self._record.find("cosine_mean", model=model, set="corpus"):
            speed = workloads and self._record.find(
                "sentences_per_s", question="throughput", model=model, engine=one.engine, workload=workloads[0]
            )
            if speed and one.engine != one.parameters["reference"]:
                items.append((self._titles[one.engine], self._kind(one.engine), 1 - median(one), median(speed[0])))
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
                f"{self._titles[engine]}, {workload}", self._kind(engine), share.value, share.low, share.high,
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
            (f"{self._titles[engine]}, {workload}", figures.operators(self._record, model, engine, workload))
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
        titles = {engine: self._titles.get(engine, engine) for engine in curves}
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


def _id(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name)
