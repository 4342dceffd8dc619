"""The page's tables, as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

from m3e_bench.record import Record
from m3e_bench.report import figures
from m3e_bench.report.figures import ACCURACY
from m3e_bench.statistics import median


def accuracy(record: Record, model: str) -> str:
    """One table for each set of texts; empty where nothing was compared."""
    parts = []
    for name in figures.values(record, "cosine_mean", "set", model=model):
        lines = [
            _line(record, engine, [f"<td>{_digits(metric, found.get(metric))}</td>" for metric in ACCURACY])
            for engine, found in figures.accuracy(record, model, name).items()
        ]
        parts.append(f"<h3>{html.escape(name)}</h3>{_table(['engine', *ACCURACY.values()], lines)}")
    return "<br>".join(parts)


def cost(record: Record, model: str, price_per_hour: float) -> str:
    """Price of a million texts of each workload; the page's script follows the price through ``data-rate``."""
    workloads = figures.values(record, "sentences_per_s", "workload", question="throughput", model=model)
    rates = {
        (one.engine, one.parameters["workload"]): median(one)
        for one in record.find("sentences_per_s", question="throughput", model=model)
        if "workload" in one.parameters
    }
    engines = sorted({engine for engine, _ in rates}, key=lambda engine: -rates.get((engine, workloads[0]), 0.0))
    lines = []
    for engine in engines:
        cells = []
        for workload in workloads:
            rate = rates.get((engine, workload))
            price = "" if rate is None else f"{figures.cost_per_million(rate, price_per_hour):.4f}"
            cells.append("<td></td>" if rate is None else f'<td data-rate="{rate:.3f}">{price}</td>')
        lines.append(_line(record, engine, cells))
    return _table(["engine", *workloads], lines) if lines else ""


def price_field(price_per_hour: float) -> str:
    """Where a reader puts what the machine costs."""
    field = (
        f'<input id="price" type="number" min="0" step="0.01" value="{price_per_hour:g}" aria-label="price per hour">'
    )
    return f'<p class="note">Price of this machine per hour: {field}</p>'


def engines(record: Record) -> str:
    """Versions, and what could not be measured."""
    lines = []
    for engine in record.content["engines"].values():
        versions = ", ".join(f"{name} {version}" for name, version in engine["versions"].items())
        cells = (engine["title"], versions, "; ".join(engine["problems"]) or "measured")
        lines.append("<tr>" + "".join(f'<td class="words">{html.escape(cell)}</td>' for cell in cells) + "</tr>")
    table = _table(["engine", "versions", "state"], lines)
    return f'<h2 id="engines">Engines</h2><section class="card">{table}</section>'


def _line(record: Record, engine: str, cells: Sequence[str]) -> str:
    kind = ' class="ours"' if figures.is_ours(record, engine) else ""
    return f"<tr{kind}><td>{html.escape(record.title(engine))}</td>{''.join(cells)}</tr>"


def _table(columns: Sequence[str], lines: Sequence[str]) -> str:
    heads = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'


def _digits(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.5f}" if metric.startswith("cosine") else f"{value:.4f}"
