"""What stays resident after both workloads, and the highest that it was."""

from __future__ import annotations

from m3e_bench.models import Model
from m3e_bench.record import Series
from m3e_bench.runner import OpenEngine, Run


def ask(run: Run, model: Model) -> None:
    """Let a new process encode the workloads, and read its memory.

    The processes that were timed have seen other texts meanwhile, or are those of a resumed run.
    """
    run.close_all()

    def measure(opened: OpenEngine, number: int) -> list[Series]:
        process = opened.process
        if not process.request("memory")["resident_bytes"]:
            return []  # a server somewhere else
        for workload in run.workloads:
            opened.give(workload.name, run.sample(workload, model))
            opened.seconds(workload.name)
        answer = process.request("memory")
        return [
            Series(
                "memory", f"{kind}_mb", "MB", "lower", model.name, opened.engine.name,
                ((answer[f"{kind}_bytes"] / 1e6,),), {"after": "workloads"},
            )
            for kind in ("resident", "peak")
        ]  # fmt: skip

    run.interleave("memory", model, measure, rounds=1)
