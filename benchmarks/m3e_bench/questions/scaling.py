"""What more threads, larger batches, larger models and larger corpora do.

Model size needs no measurement of its own: it is throughput over the models of the record.
"""

from __future__ import annotations

import itertools
from typing import Any

from m3e_bench.models import Model
from m3e_bench.record import Series
from m3e_bench.runner import OpenEngine, Run
from m3e_bench.workloads import sized_texts
from m3e_export.texts import corpus


def ask(run: Run, model: Model) -> None:
    """Measure on the first model."""
    if model is run.models[0]:
        _batches(run, model)
        _corpora(run, model)
        _threads(run, model)


def _threads(run: Run, model: Model) -> None:
    """Sentences a second with 1, 2, 4, ... threads up to all."""
    workload = run.workloads[0]
    counts = sorted({*itertools.takewhile(lambda n: n < run.threads, (2**i for i in range(10))), run.threads})
    texts = run.sample(workload, model)
    for threads in counts:

        def measure(opened: OpenEngine, number: int, threads: int = threads) -> list[Series]:
            if opened.engine.module == "openai_http":
                return []
            process = opened.process
            opened.give(workload.name, texts)
            if opened.threads != threads:
                process.request("load", **run.launcher.arguments(opened.engine, model), threads=threads)
                opened.threads = threads
            process.request("latency", name=workload.name, count=1, batch_size=32)  # the first batch is slower
            parameters = {"by": "threads", "threads": threads, "workload": workload.name}
            return [_series(model, opened, len(texts) / opened.seconds(workload.name), parameters)]

        run.interleave(f"scaling {threads} threads", model, measure, rounds=min(3, run.budget.rounds))
    run.close_all()  # whoever asks next wants all threads again


def _batches(run: Run, model: Model) -> None:
    """Sentences a second when a caller brings 1, 8 and 64 texts of 32 tokens at once."""
    for rows in (1, 8, 64):

        def measure(opened: OpenEngine, number: int, rows: int = rows) -> list[Series]:
            opened.give("batches", sized_texts(32, 256))
            request: dict[str, Any] = {"name": "batches", "batch_size": rows}
            opened.process.request("latency", count=1, **request)
            answer = opened.process.request("latency", count=max(1, 32 // rows), start=number, **request)
            seconds = sum(answer["milliseconds"]) / 1e3
            rate = len(answer["milliseconds"]) * rows / seconds
            return [_series(model, opened, rate, {"by": "batch_tokens", "batch_tokens": 32 * rows})]

        run.interleave(f"scaling batches of {32 * rows} tokens", model, measure, rounds=min(3, run.budget.rounds))


def _corpora(run: Run, model: Model) -> None:
    """Sentences a second, and memory, of one call with more and more sentences; ours alone."""
    lines = [line for line in corpus("zh") if len(line) <= 40]
    for size in run.budget.corpus_sizes:
        texts = [line for line, _ in zip(itertools.cycle(lines), range(size), strict=False)]

        def measure(opened: OpenEngine, number: int, size: int = size, texts: list[str] = texts) -> list[Series]:
            opened.give(f"corpus of {size}", texts)
            seconds = opened.seconds(f"corpus of {size}")
            parameters = {"by": "corpus_texts", "corpus_texts": size}
            resident = opened.process.request("memory")["resident_bytes"] / 1e6
            return [
                _series(model, opened, size / seconds, parameters),
                Series(
                    "scaling", "resident_mb", "MB", "lower", model.name, opened.engine.name, ((resident,),), parameters
                ),
            ]

        engines = [engine for engine in run.engines if engine.ours]
        run.interleave(f"scaling corpus of {size}", model, measure, rounds=1, engines=engines)


def _series(model: Model, opened: OpenEngine, value: float, parameters: dict[str, object]) -> Series:
    return Series(
        "scaling", "sentences_per_s", "1/s", "higher", model.name, opened.engine.name, ((value,),), parameters
    )
