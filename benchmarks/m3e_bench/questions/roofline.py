"""How near ours is to the bound: the graph's matrix products alone, in onnxruntime, measured in the same rounds.

And where the rest of the time goes, from onnxruntime's profiler.
"""

from __future__ import annotations

import itertools
from typing import Any

from m3e.bundle import Bundle
from m3e.tokenizer import Tokenizer
from m3e_bench import peers
from m3e_bench.models import Model
from m3e_bench.peers import Engine
from m3e_bench.record import Series
from m3e_bench.runner import OpenEngine, Run
from m3e_bench.workloads import Workload

# Rows of one product: what keeps activations in cache differs from one processor to the next.
_BATCH_TOKENS = (512, 1024)


def ask(run: Run, model: Model) -> None:
    """Measure both precisions of ours against the products of their own graphs."""
    for engine in run.engines:
        if engine.ours and not run.problem(engine, model):
            bound = next(bound for bound in peers.BOUNDS if bound.precision == engine.precision)
            best = _best_batch(run, model, bound)
            if best is not None:
                for workload in run.workloads[: run.budget.bound_workloads]:
                    _side_by_side(run, model, workload, engine, bound, best)
            _profile(run, model, engine)


def _best_batch(run: Run, model: Model, bound: Engine) -> dict[str, int] | None:
    """Find the rows and the number of workers with which the products are fastest: the strictest bound."""
    fact = f"roofline batch/{bound.name}/{model.name}"
    if fact not in run.journal:

        def search(opened: OpenEngine) -> list[Series]:
            found: dict[tuple[int, int], float] = {}
            for rows, workers in itertools.product(_BATCH_TOKENS, sorted({1, run.threads})):
                request = {"tokens": 2048, "batch_tokens": rows, "workers": workers}
                answer = opened.process.request("call", method="run", **request)
                found[rows, workers] = answer["tokens"] / answer["seconds"]
            rows, workers = max(found, key=lambda case: found[case])
            run.journal.keep_fact(fact, {"batch_tokens": rows, "workers": workers})
            return []

        run.once(f"roofline search/{model.name}/{bound.name}", bound, model, search)
        if fact not in run.journal:
            return None
    best: dict[str, int] = run.journal.fact(fact)
    return best


def _side_by_side(
    run: Run, model: Model, workload: Workload, engine: Engine, bound: Engine, best: dict[str, int]
) -> None:
    """Tokens a second of ours and of the bound, round by round."""
    name, texts = workload.name, run.sample(workload, model)
    tokens = _count_tokens(run, model, texts)

    def measure(opened: OpenEngine, number: int) -> list[Series]:
        if opened.engine is bound:
            answer = opened.process.request("call", method="run", tokens=tokens, **best)
            rate = answer["tokens"] / answer["seconds"]
        else:
            opened.give(name, texts)
            opened.warm_up(texts)
            rate = tokens / opened.seconds(name)
        return [
            Series(
                "roofline", "tokens_per_s", "1/s", "higher", model.name, opened.engine.name, ((rate,),),
                {"workload": name},
            )
        ]  # fmt: skip

    rounds = run.rounds(workload, model)
    run.interleave(f"roofline {engine.precision} {name}", model, measure, rounds=rounds, engines=[engine, bound])


def _profile(run: Run, model: Model, engine: Engine) -> None:
    """Seconds of each operator type on a part of each workload."""
    for workload in run.workloads[: run.budget.bound_workloads]:
        texts = run.sample(workload, model)

        def measure(opened: OpenEngine, name: str = workload.name, texts: Any = texts) -> list[Series]:
            answer = opened.process.request("call", method="profile", texts=list(texts))
            return [
                Series(
                    "roofline", "operator_s", "s", "neither", model.name, opened.engine.name, ((seconds,),),
                    {"workload": name, "operator": operator},
                )
                for operator, seconds in answer["seconds"].items()
            ]  # fmt: skip

        run.once(f"roofline profile {workload.name}/{model.name}/{engine.name}", engine, model, measure)


def _count_tokens(run: Run, model: Model, texts: tuple[str, ...]) -> int:
    """Real tokens of all texts, special ones included, cut as the model cuts."""
    ours = next(engine for engine in run.engines if engine.ours)
    bundle = Bundle(run.launcher.bundle(ours, model))
    tokenizer = Tokenizer(bundle.read("tokenizer.json"), bundle.manifest.model.max_seq_length)
    return int(tokenizer(texts).n_tokens.sum())
