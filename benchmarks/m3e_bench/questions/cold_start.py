"""From the start of a process to its first vector: interpreter, imports, loading, checks, one text."""

from __future__ import annotations

from m3e_bench.models import Model
from m3e_bench.record import Series
from m3e_bench.runner import OpenEngine, Run


def ask(run: Run, model: Model) -> None:
    """Start new processes; the files are in the page cache, as on a machine that restarts a service."""

    def measure(opened: OpenEngine, number: int) -> list[Series]:
        if opened.engine.module == "openai_http":
            return []  # its server is not ours to start
        process = run.launcher.start(opened.engine, model)
        try:
            answer = process.request(
                "first_vector", **run.launcher.arguments(opened.engine, model), threads=run.threads
            )
            seconds = answer["time"] - process.started
        finally:
            process.close()
        found = {"first_vector_s": ("s", seconds)}
        found |= {f"{kind}_mb": ("MB", answer[f"{kind}_bytes"] / 1e6) for kind in ("resident", "peak")}
        return [
            Series(
                "cold_start", metric, unit, "lower", model.name, opened.engine.name, ((value,),),
                {"after": "first vector"},
            )
            for metric, (unit, value) in found.items()
        ]  # fmt: skip

    run.interleave("cold start", model, measure, rounds=run.budget.cold_starts)
