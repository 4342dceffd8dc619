"""The tables of README and of docs, from the committed records; ``--check`` fails where they differ."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from m3e import M3EError
from m3e_bench.peers import REFERENCE
from m3e_bench.record import Record, load_record
from m3e_bench.report.figures import bound_shares, number, operators, percentiles, values
from m3e_bench.statistics import median, ratio

# The checkout: a wheel has neither README nor records.
_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "benchmarks" / "results"
_TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)
_NONE = "–"
# Whose profile is shown, and the smallest share of its time that an operator is named for.
_PROFILED, _SMALLEST = "m3e-int8", 0.01


def table(record: Record, record_name: str) -> str:
    """Lay the figures that a reader of the README wants out as Markdown: medians."""
    lines = []
    for model in record.content["models"]:
        workloads = values(record, "sentences_per_s", "workload", question="throughput", model=model)
        if not workloads:
            continue
        heads = [f"{workload}, sentences/s" for workload in workloads]
        lines += [
            f"**{model} shape**" if record.content["models"][model]["weights"] == "random" else f"**{model}**",
            "",
            "| | " + " | ".join(heads) + " | one text, p50 | first vector | resident memory | mean cosine |",
            "|---|" + "---|" * (len(heads) + 4),
            *_rows(record, model, workloads),
            "",
        ]
    machine, settings = record.content["machine"], record.content["settings"]
    features = [name for name in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if name in machine["isa"]]
    lines.append(
        f"Medians on {settings['threads']} threads of an {machine['cpu']} ({', '.join(features)}), all engines in turn "
        "in one run; in brackets the ratio to sentence-transformers on PyTorch FP32. One text has 12 tokens; a first "
        "vector counts from the start of the process; memory is read after all workloads; the cosine is "
        "to PyTorch FP32. "
        f"[The page](benchmarks/results/{record_name}.html) shows more, "
        f"[the record](benchmarks/results/{record_name}.json) has every sample; `make bench` measures on your machine."
    )
    return "\n".join(lines) + "\n"


def serving_table(records: dict[str, dict[str, Any]]) -> str:
    """Lay the service's figures out as Markdown, a column for each record of ``benchmarks.serving``, by its model."""

    def row(what: str, part: str, say: Callable[[dict[str, Any]], str]) -> str:
        cells = [say(record[part]) if part in record else _NONE for record in records.values()]
        return "| " + " | ".join([what, *cells]) + " |"

    def overload(part: dict[str, Any]) -> str:
        return (
            f"{part['sent']:,} requests, {part['lost']} lost; {part['goodput_of_capacity']:.2f} of its capacity "
            f"answered, p99 {part['p99_accepted_ms']:,.0f} ms; p99 of a refusal {part['p99_refusal_ms']:,.0f} ms, "
            f"of what the load itself was late {part['p99_sent_late_ms']:,.0f} ms"
        )

    lines = [
        "| | " + " | ".join(records) + " |",
        "|---|" + "---|" * len(records),
        row("one short text, p50", "overhead", lambda part: (
            f"{part['http_p50_ms']:.1f} ms, {part['overhead_p50_ms']:.2f} ms more than in the library")),
        row("64 connections, a text each, as OpenAI's clients ask", "saturation", lambda part: (
            f"{number(part['openai']['http_per_s'])} sentences/s, {part['openai']['ratio']:.2f} of the library's "
            "`encode`")),
        row("the same at `/embed`, floats in JSON", "saturation", lambda part: (
            f"{number(part['embed']['http_per_s'])} sentences/s, {part['embed']['ratio']:.2f}")),
        row("the same beside infinity on optimum", "infinity", lambda part: (
            f"{part['throughput_ratio']:.1f} times as many; p99 at half of each one's own load "
            f"{part['m3e_p99_at_half_ms']:.0f} ms against {part['infinity_p99_at_half_ms']:.0f} ms, at the same load "
            f"{part['m3e_p99_at_infinitys_half_ms']:.0f} ms")),
        row("twice what it can do, for a minute", "overload", overload),
        row("five times", "storm", overload),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def profile_table(records: Sequence[Record]) -> str:
    """Lay the bound and the operators' shares of the time out as Markdown, a column for each model and workload."""
    columns: dict[str, dict[str, str]] = {}
    for record in records:
        for model in record.content["models"]:
            for workload, name, _, share in bound_shares(record, model):
                if name == _PROFILED:
                    found = operators(record, model, name, workload)
                    columns[f"{model}, {workload}"] = {
                        "share of the bound": f"{share.value:.2f} ({share.low:.2f}–{share.high:.2f})",
                        **{operator: f"{100 * part:.0f} %" for operator, part in found if part >= _SMALLEST},
                        "all others": f"{100 * sum(part for _, part in found if part < _SMALLEST):.0f} %",
                    }
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    rows["all others"] = rows.pop("all others")
    lines = [
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
        *("| " + " | ".join([row, *(column.get(row, _NONE) for column in columns.values())]) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def stacks_table(content: dict[str, Any]) -> str:
    """Lay the record of ``benchmarks.stacks`` out as Markdown, the fastest first."""
    stacks = sorted(content["stacks"].items(), key=lambda stack: -stack[1]["per_s"])
    lines = [
        "| | requests/s, 64 connections | p50 of one |",
        "|---|---|---|",
        *(f"| {name} | {number(figures['per_s'])} | {figures['p50_ms']:.2f} ms |" for name, figures in stacks),
    ]
    return "\n".join(lines) + "\n"


def write(page: Path, *tables: str) -> None:
    """Write tables into their places in a page, in its order."""
    page.write_text(_expected(page, tables), encoding="utf-8")


def check(page: Path, *tables: str) -> None:
    """Compare, and change nothing.

    Raises:
        M3EError: The page shows other figures than the record.
    """
    if _expected(page, tables) != page.read_text(encoding="utf-8"):
        raise M3EError(f"{page.name} does not show the record's figures; run: python -m benchmarks readme")


def quotes() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Each page of the checkout that quotes records, and the tables that it has to show."""
    yield _ROOT / "README.md", (table(load_record(_RESULTS / "cpu.json"), "cpu"),)
    shapes = {"m3e-small shape": "serving", "m3e-base shape": "serving-base"}
    serving = serving_table({shape: _read(name) for shape, name in shapes.items()})
    yield _ROOT / "docs" / "serving.md", (serving, stacks_table(_read("stacks")))
    profiled = [load_record(_RESULTS / f"{name}.json") for name in ("cpu", "cpu-base")]
    yield _ROOT / "docs" / "benchmarks.md", (profile_table(profiled),)


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((_RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _expected(page: Path, tables: Sequence[str]) -> str:
    if not page.is_file():
        raise M3EError(f"{page} is not there: this command works in a checkout")
    text = page.read_text(encoding="utf-8")
    n = len(_TABLE.findall(text))
    if n != len(tables):
        raise M3EError(f"{page} has {n} places <!-- table --> ... <!-- /table -->, expected {len(tables)}")
    left = iter(tables)
    return _TABLE.sub(lambda match: match[1] + next(left) + match[2], text)


def _rows(record: Record, model: str, workloads: list[str]) -> list[str]:
    first = {
        one.engine: median(one)
        for one in record.find("sentences_per_s", question="throughput", model=model, workload=workloads[0])
    }
    lines = []
    for engine in sorted(first, key=lambda engine: -first[engine]):
        cells = []
        for workload in workloads:
            mine, other = (
                record.find("sentences_per_s", question="throughput", model=model, engine=name, workload=workload)
                for name in (engine, REFERENCE)
            )
            value = number(median(mine[0])) if mine else _NONE
            cells.append(f"{value} ({ratio(mine[0], other[0]).value:.1f}×)" if mine and other else value)
        wait = record.find("latency_ms", model=model, engine=engine, loop="closed", batch_size=1, length_tokens=12)
        cells.append(f"{percentiles(wait[0])['p50']:.1f} ms" if wait else _NONE)
        start = record.find("first_vector_s", model=model, engine=engine)
        cells.append(f"{median(start[0]):.2f} s" if start else _NONE)
        memory = record.find("resident_mb", model=model, engine=engine, after="workloads")
        cells.append(f"{median(memory[0]):.0f} MB" if memory else _NONE)
        cosine = record.find("cosine_mean", model=model, engine=engine, set="corpus")
        cells.append(f"{median(cosine[0]):.5f}" if cosine else _NONE)
        lines.append("| " + " | ".join([record.title(engine), *cells]) + " |")
    return lines
