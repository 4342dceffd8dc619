"""The command ``quality``: MTEB for each engine in turn, then one table."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from m3e import M3EError
from m3e_bench import environments, peers
from m3e_bench.budget import FULL
from m3e_bench.launch import own_roots
from m3e_bench.models import Model, find_model
from m3e_bench.peers import Engine
from m3e_bench.process import WORKER
from m3e_bench.quality.local_tasks import local_tasks
from m3e_bench.record import Series, write_record
from m3e_bench.runner import Run
from m3e_bench.workloads import check_data

Scores = Mapping[str, Mapping[str, Any]]


def measure_quality(parsed: argparse.Namespace) -> None:
    """Run the tasks, and write a record and a table."""
    python = environments.interpreter("mteb", parsed.work)
    data = check_data(parsed.data) if parsed.data else None
    models = [find_model(text, parsed.work) for text in parsed.models]
    engines = peers.choose(parsed.engines, [])
    output = parsed.output or parsed.work / "quality"
    tables = []
    with Run(models, [], engines, data, parsed.work, parsed.threads, FULL, quick=False, fresh=True) as run:
        for model in models:
            local = local_tasks(data, model.language, parsed.limit)
            found = {engine.name: _evaluate(run, python, engine, model, parsed.tasks, local) for engine in engines}
            tables.append(_table(model, engines, found))
        record = run.record()
    write_record(output.with_name(output.name + ".json"), record)
    text = "\n".join([*tables, _published()])
    output.with_name(output.name + ".md").write_text(text, encoding="utf-8")
    print(text)
    if not record["series"]:
        raise M3EError("no task could be scored; the table says why")


def _evaluate(
    run: Run, python: Path, engine: Engine, model: Model, tasks: Sequence[str], local: list[dict[str, Any]]
) -> Scores:
    run.launcher.prepare(engine, model)
    place = run.launcher.logs
    order = {
        "tasks": list(tasks),
        "local": local,
        "engine": {
            "name": engine.name,
            "command": [str(run.launcher.interpreter(engine)), "-P", str(WORKER), engine.module],
            "environment": {"OMP_NUM_THREADS": str(run.threads), "PYTHONPATH": "", **own_roots(engine)},
            "load": {**run.launcher.arguments(engine, model), "threads": run.threads},
        },
        "output": str(place / "scores.json"),
    }
    (place / "order.json").write_text(json.dumps(order), encoding="utf-8")
    script = Path(__file__).with_name("mteb_process.py")
    done = subprocess.run([str(python), "-P", str(script), str(place / "order.json")], stdout=sys.stderr)
    if done.returncode != 0:
        raise M3EError(f"mteb ended with {done.returncode} for {engine.name}; its messages are above")
    scores: Scores = json.loads((place / "scores.json").read_text(encoding="utf-8"))
    for name, one in scores.items():
        step = f"quality {name}/{model.name}/{engine.name}/0"
        if "score" in one:
            series = Series(
                "quality", one["metric"], "1", "higher", model.name, engine.name, ((one["score"],),), {"task": name}
            )
            run.journal.add(step, [series], 0.0)
    return scores


def _table(model: Model, engines: Sequence[Engine], found: Mapping[str, Scores]) -> str:
    lines = [
        f"## {model.name}", "",
        "| task | metric | " + " | ".join(engine.title for engine in engines) + " |",
        "|---|---|" + "---|" * len(engines),
    ]  # fmt: skip
    for task in dict.fromkeys(name for scores in found.values() for name in scores):
        metric = next((scores[task]["metric"] for scores in found.values() if "metric" in scores.get(task, {})), "")
        cells = []
        for engine in engines:
            one = found[engine.name].get(task, {"problem": "not run"})
            cells.append(
                f"{one['score']:.4f}" if "score" in one else one["problem"].replace("|", "/").replace("\n", " ")
            )
        lines.append(f"| {task} | {metric} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _published() -> str:
    known = json.loads(resources.files("m3e_bench.quality").joinpath("published.json").read_text("utf-8"))
    lines = [f"## Published ({known['source']})", "", "| model | accuracy | nDCG@10 |", "|---|---|---|"]
    lines += [f"| {name} | {one['accuracy']} | {one['ndcg_at_10']} |" for name, one in known["models"].items()]
    return "\n".join([*lines, ""])
