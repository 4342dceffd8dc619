"""How many texts a second, texts in and vectors out: by workload, and by length in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from m3e_bench.models import Model
from m3e_bench.record import Series
from m3e_bench.runner import OpenEngine, Run
from m3e_bench.workloads import PEERS_BATCH, Workload, sized_texts

_ESTIMATE_TEXTS = 32  # they show how long the whole takes
_LENGTH_TOKENS = 1024  # of all texts of one length together


def ask(run: Run, model: Model) -> None:
    """Measure the workloads, and on the first model each length too."""
    for workload in run.workloads:
        _decide_parts(run, model, workload)
        texts = run.sample(workload, model)
        _measure(run, model, workload.name, texts, {"workload": workload.name}, run.rounds(workload, model))
    if model is run.models[0]:
        for length in run.budget.lengths:
            texts = sized_texts(length, max(2, _LENGTH_TOKENS // length))
            _measure(run, model, f"{length}-tokens", texts, {"length_tokens": length}, min(3, run.budget.rounds))


def _measure(
    run: Run, model: Model, name: str, texts: Sequence[str], parameters: dict[str, object], rounds: int
) -> None:
    """Measure sentences a second over a list of texts, the same in every round."""

    def measure(opened: OpenEngine, number: int) -> list[Series]:
        opened.give(name, texts)
        opened.warm_up(texts)
        engine, samples = opened.engine.name, ((len(texts) / opened.seconds(name),),)
        return [Series("throughput", "sentences_per_s", "1/s", "higher", model.name, engine, samples, parameters)]

    run.interleave(f"throughput {name}", model, measure, rounds=rounds)


def _decide_parts(run: Run, model: Model, workload: Workload) -> None:
    """Find how small a part keeps the slowest engine's turn within the budget; decided once, then kept."""
    fact = f"parts/{workload.name}/{model.name}"
    if fact in run.journal:
        return
    estimates = f"whole workload in seconds/{workload.name}/{model.name}/"
    step = max(1, len(workload.texts) // _ESTIMATE_TEXTS)
    few, fewer = workload.texts[::step], workload.texts[:: step * 4]

    def estimate(opened: OpenEngine) -> list[Series]:
        for name, texts in (("warm-up", fewer), ("estimate", few)):
            opened.give(f"{name} {workload.name}", texts)
            seconds = opened.seconds(f"{name} {workload.name}")
        run.journal.keep_fact(estimates + opened.engine.name, seconds / len(few) * len(workload.texts))
        return []

    for engine in run.engines:
        run.once(f"estimate {workload.name}/{model.name}/{engine.name}", engine, model, estimate)
    seconds = [whole for _, whole in run.journal.facts(estimates)]
    most = len(workload.texts) // (run.budget.least_batches * PEERS_BATCH)
    parts = min(math.ceil(max(seconds, default=0.0) / run.budget.turn_s), most)
    round_s = sum(seconds) / max(1, parts)
    rounds = min(run.budget.rounds, int(run.budget.figure_s / round_s)) if round_s else run.budget.rounds
    run.journal.keep_fact(f"rounds/{workload.name}/{model.name}", max(2, rounds))
    run.journal.keep_fact(fact, max(1, parts))
