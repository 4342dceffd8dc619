"""What each command does; cli.py has the options."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from m3e import InputError, M3EError
from m3e_bench import budget, environments, peers
from m3e_bench import readme as pages
from m3e_bench.compare import Condition, compare_records
from m3e_bench.models import find_model
from m3e_bench.quality.run import measure_quality
from m3e_bench.questions import accuracy, cold_start, latency, memory, roofline, scaling, throughput
from m3e_bench.record import Record, load_record, write_record
from m3e_bench.report.markdown import render_markdown
from m3e_bench.report.page import render_page
from m3e_bench.runner import Run
from m3e_bench.workloads import check_data

QUESTIONS = {
    "throughput": throughput,
    "latency": latency,
    "accuracy": accuracy,
    "roofline": roofline,
    "cold_start": cold_start,
    "scaling": scaling,
    "memory": memory,
}


def run(parsed: argparse.Namespace) -> None:
    """Measure, and write the record, the page and the Markdown."""
    if parsed.threads < 1:
        raise InputError(f"--threads is {parsed.threads}, expected at least 1")
    bounds = budget.QUICK if parsed.quick else budget.FULL
    if parsed.rounds is not None:
        if parsed.rounds < 1:
            raise InputError(f"--rounds is {parsed.rounds}, expected at least 1")
        bounds = dataclasses.replace(bounds, rounds=parsed.rounds)
    models = [find_model(text, parsed.work) for text in parsed.models or ["small"]]
    accuracy_models = [find_model(text, parsed.work) for text in parsed.accuracy_models]
    if parsed.endpoint and len(models + accuracy_models) > 1:
        raise InputError("an endpoint serves one model: name just that one with --models")
    names = parsed.engines if parsed.engines or not parsed.quick else list(peers.QUICK)
    engines = peers.choose(names, parsed.endpoint)
    data = check_data(parsed.data) if parsed.data else None
    questions = parsed.questions or [name for name in QUESTIONS if not (parsed.quick and name == "scaling")]
    needs = {"roofline", "scaling", "memory"} & set(questions)
    if needs and "throughput" not in questions:
        asked = ", ".join(sorted(needs))
        raise InputError(f"{asked}: the parts of the workloads are decided by throughput; ask throughput too")
    with Run(
        models, accuracy_models, engines, data, parsed.work, parsed.threads, bounds,
        quick=parsed.quick, fresh=parsed.fresh,
    ) as current:  # fmt: skip
        for model in models + accuracy_models:
            for name in questions if model in models else ["accuracy"]:
                QUESTIONS[name].ask(current, model)
            current.close_all()
        content = current.record()
    output = parsed.output or parsed.work / "report"
    path = output.with_name(output.name + ".json")
    record = write_record(path, content)
    print(f"wrote {path}", file=sys.stderr)
    current.finish()
    _write_reports(record, output, parsed.price_per_hour)
    if not any(one.engine.startswith("m3e-") for one in record.series) and any(engine.ours for engine in engines):
        raise M3EError("nothing of ours could be measured; the record says why")


def report(parsed: argparse.Namespace) -> None:
    """Write the page and the Markdown of a record again."""
    _write_reports(load_record(parsed.record), parsed.output or parsed.record.with_suffix(""), parsed.price_per_hour)


def compare(parsed: argparse.Namespace) -> None:
    """Compare two records; fail where a condition holds."""
    conditions = [Condition.parse(text) for text in parsed.fail_if]
    outcome = compare_records(
        load_record(parsed.old), load_record(parsed.new), conditions, parsed.engines, parsed.relative_to
    )
    print(outcome.text)
    if outcome.failures:
        raise M3EError(f"{len(outcome.failures)} of the figures compared tripped a condition")


def readme(parsed: argparse.Namespace) -> None:
    """Write the tables that pages quote from the committed records, or check them."""
    for page, tables in pages.quotes():
        (pages.check if parsed.check else pages.write)(page, *tables)


def engines(parsed: argparse.Namespace) -> None:
    """List the engines, and install their environments if asked."""
    for engine in peers.ENGINES:
        state = "runs in this environment"
        if engine.environment is not None:
            state = f"environment {engine.environment}"
            if parsed.install:
                try:
                    environments.interpreter(engine.environment, parsed.work)
                    state += ": installed"
                except environments.EnvironmentUnavailableError as error:
                    state += f": {error}"
        print(f"{engine.name:<18}{engine.title:<44}{state}")


def quality(parsed: argparse.Namespace) -> None:
    """Run MTEB tasks with PyTorch and every precision side by side."""
    measure_quality(parsed)


def _write_reports(record: Record, stem: Path, price_per_hour: float) -> None:
    page, text = stem.with_name(stem.name + ".html"), stem.with_name(stem.name + ".md")
    page.write_text(render_page(record, price_per_hour), encoding="utf-8")
    text.write_text(render_markdown(record, price_per_hour), encoding="utf-8")
    print(f"wrote {page} and {text}", file=sys.stderr)
