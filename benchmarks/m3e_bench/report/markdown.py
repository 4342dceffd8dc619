"""A record as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from m3e_bench.record import Record
from m3e_bench.report import figures
from m3e_bench.report.figures import ACCURACY, number, times


def render_markdown(record: Record, price_per_hour: float) -> str:
    """Lay a record out as Markdown."""
    machine, settings = record.content["machine"], record.content["settings"]
    lines = [
        "# Benchmark of m3e and its peers",
        "",
        f"{machine['cpu']} ({', '.join(machine['isa'])}), {settings['threads']} threads for every engine; "
        f"{record.content['created']}; m3e-runtime {record.content['code']['version']}, "
        f"commit {(record.content['code']['commit'] or 'none')[:12]}. "
        "Engines took turns in one run; ratios are of medians, with the lowest and highest ratio within a round.",
    ]
    for model in record.content["models"]:
        lines += ["", f"## {model} ({record.content['models'][model]['weights']} weights)"]
        lines += _throughput(record, model, price_per_hour)
        lines += _latency(record, model)
        lines += _single(record, model, "first_vector_s", "Process start to first vector, s")
        lines += _single(record, model, "resident_mb", "Resident memory after both workloads, MB", after="workloads")
        lines += _accuracy(record, model)
        lines += _bound(record, model)
    lines += ["", "## Engines", "", "| engine | versions | problems |", "|---|---|---|"]
    for engine in record.content["engines"].values():
        versions = ", ".join(f"{name} {version}" for name, version in engine["versions"].items())
        problems = "; ".join(problem.replace("|", "\\|").replace("\n", " ") for problem in engine["problems"])
        lines.append(f"| {engine['title']} | {versions} | {problems or 'none'} |")
    return "\n".join(lines) + "\n"


def _throughput(record: Record, model: str, price_per_hour: float) -> list[str]:
    lines = []
    for workload in figures.values(record, "sentences_per_s", "workload", model=model):
        found = record.find("sentences_per_s", question="throughput", model=model, workload=workload)
        table = [
            (row.title, number(row.value), times(row.times),
             f"{figures.cost_per_million(row.value, price_per_hour):.4f}")
            for row in figures.rows(record, found)
        ]  # fmt: skip
        lines += _table(
            f"Throughput, {workload}",
            ["engine", "sentences/s", "against torch FP32", f"per million at {price_per_hour:g} an hour"], table,
        )  # fmt: skip
    return lines


def _latency(record: Record, model: str) -> list[str]:
    lines = []
    cases: dict[str, list[tuple[str, ...]]] = {}
    for one in record.find("latency_ms", model=model):
        at = one.parameters
        loop = f"open loop, {at['rate_per_s']}/s" if at["loop"] == "open" else "closed loop"
        case = f"Latency, ms: {at['batch_size']} × {at['length_tokens']} tokens, {loop}"
        found = figures.percentiles(one)
        cases.setdefault(case, []).append((record.title(one.engine), *(f"{value:.2f}" for value in found.values())))
    for case, table in cases.items():
        lines += _table(case, ["engine", "p50", "p95", "p99"], sorted(table, key=lambda row: float(row[1])))
    for rate in figures.values(record, "processor_ms", "rate_per_s", model=model):
        lines += _single(
            record, model, "processor_ms", f"Processor time of a text, ms, open loop, {rate}/s", rate_per_s=rate
        )
    return lines


def _single(record: Record, model: str, metric: str, heading: str, **where: Any) -> list[str]:
    found = record.find(metric, model=model, **where)
    table = [(row.title, number(row.value), times(row.times)) for row in figures.rows(record, found)]
    return _table(heading, ["engine", "median", "against torch FP32"], table)


def _accuracy(record: Record, model: str) -> list[str]:
    lines = []
    for name in figures.values(record, "cosine_mean", "set", model=model):
        table = [
            (record.title(engine), *(f"{found[metric]:.5f}" if metric in found else "" for metric in ACCURACY))
            for engine, found in figures.accuracy(record, model, name).items()
        ]
        lines += _table(f"Accuracy against FP32 PyTorch, {name}", ["engine", *ACCURACY.values()], table)
    return lines


def _bound(record: Record, model: str) -> list[str]:
    table = [
        (record.title(engine), workload, number(bound), f"{share.value:.2f} ({share.low:.2f}–{share.high:.2f})")
        for workload, engine, bound, share in figures.bound_shares(record, model)
    ]
    return _table(
        "Share of the bound (matrix products alone)", ["engine", "workload", "bound, tokens/s", "share"], table
    )


def _table(heading: str, columns: Sequence[str], table: Iterable[Sequence[str]]) -> list[str]:
    body = ["| " + " | ".join(row) + " |" for row in table]
    if not body:
        return []
    return ["", f"### {heading}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]
