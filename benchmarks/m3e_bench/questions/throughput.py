"""How many texts a second, texts in and vectors out: by workload, and by length in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from m3e_bench.models import Model
from m3e_bench.record import Series
from m3e_bench.runner import OpenEngine, Run
from m3e_bench.workloads import sized_texts

_SAMPLE = 64  # texts that show how long the whole takes
_LENGTH_TOKENS = 2048  # of all texts of one length together


def ask(run: Run, model: Model) -> None:
    """Measure the workloads, and on the first model each length too."""
    for workload in run.workloads:
        portions = _portions(run, model, workload.name, workload.texts, run.budget.turn_s)
        parameters = {"workload": workload.name}
        _measure(run, model, workload.name, workload.texts, parameters, portions, run.budget.rounds)
    if model is run.models[0]:
        for length in run.budget.lengths:
            texts = sized_texts(length, max(4, _LENGTH_TOKENS // length))
            _measure(run, model, f"{length}-tokens", texts, {"length_tokens": length}, 1, min(3, run.budget.rounds))


def _measure(
    run: Run, model: Model, name: str, texts: Sequence[str], parameters: dict[str, object], portions: int, rounds: int
) -> None:
    """Measure sentences a second over a list of texts.

    Every engine encodes the same portion in the same round. With n portions, portion i is every n-th text from the
    i-th on, so that all are alike.
    """

    def measure(opened: OpenEngine, number: int) -> list[Series]:
        opened.give(name, texts)
        if name not in opened.warm:
            opened.seconds(name, portions - 1, portions)
            opened.warm.add(name)
        seconds, count = opened.seconds(name, number % portions, portions)
        engine, samples = opened.engine.name, ((count / seconds,),)
        return [Series("throughput", "sentences_per_s", "1/s", "higher", model.name, engine, samples, parameters)]

    run.interleave(f"throughput {name}", model, measure, rounds=rounds)


def _portions(run: Run, model: Model, name: str, texts: Sequence[str], turn_s: float) -> int:
    """Find how many portions keep the slowest engine's turn within ``turn_s``; decided once, then kept."""
    fact = f"portions/{name}/{model.name}"
    if fact not in run.journal:
        slowest = 0.0
        step = max(1, len(texts) // _SAMPLE)

        def estimate(opened: OpenEngine) -> list[Series]:
            nonlocal slowest
            opened.give(name, texts)
            opened.seconds(name, 0, step * 4)
            seconds, count = opened.seconds(name, 0, step)
            slowest = max(slowest, seconds / count * len(texts))
            return []

        for engine in run.engines:
            run.once(f"estimate {name}/{model.name}/{engine.name}", engine, model, estimate)
        run.journal.keep_fact(fact, min(max(1, math.ceil(slowest / turn_s)), max(1, len(texts) // 16)))
    portions: int = run.journal.fact(fact)
    return portions
