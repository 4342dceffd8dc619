"""How long a caller waits: closed loop at small batches, and open loop at given rates from the intended send time."""

from __future__ import annotations

from typing import Any

from m3e_bench.models import Model
from m3e_bench.record import Series
from m3e_bench.runner import OpenEngine, Run
from m3e_bench.workloads import sized_texts

_WARM_UP = 5


def ask(run: Run, model: Model) -> None:
    """Measure both loops."""
    for case in run.budget.latency_cases:
        _closed(run, model, *case)
    for rate in run.budget.rates_per_s:
        _open(run, model, rate)


def _closed(run: Run, model: Model, length: int, batch_size: int) -> None:
    name = f"{length}-token-requests"

    def measure(opened: OpenEngine, number: int) -> list[Series]:
        opened.give(name, sized_texts(length, 256))
        request: dict[str, Any] = {"name": name, "batch_size": batch_size}
        # The warm-up also says how many requests a turn holds; at least 20, that a p95 means something.
        first = opened.process.request("latency", count=_WARM_UP, **request)["milliseconds"]
        count = min(400, max(20, int(run.budget.latency_turn_s * 1e3 / min(first))))
        answer = opened.process.request("latency", count=count, start=number * 37, **request)
        parameters = {"loop": "closed", "length_tokens": length, "batch_size": batch_size}
        return [_series(model, opened, tuple(answer["milliseconds"]), parameters)]

    run.interleave(f"latency {name} x{batch_size}", model, measure)


def _open(run: Run, model: Model, rate: int) -> None:
    name = "12-token-requests"

    def measure(opened: OpenEngine, number: int) -> list[Series]:
        opened.give(name, sized_texts(12, 256))
        opened.process.request("latency", count=_WARM_UP, name=name, batch_size=1)
        answer = opened.process.request("open_loop", name=name, rate=rate, seconds=run.budget.open_loop_s, seed=number)
        parameters = {"loop": "open", "length_tokens": 12, "batch_size": 1, "rate_per_s": rate}

        def one(metric: str, unit: str, better: str, value: float) -> Series:
            return Series("latency", metric, unit, better, model.name, opened.engine.name, ((value,),), parameters)

        found = [
            _series(model, opened, tuple(answer["milliseconds"]), parameters),
            one("answered_share", "1", "higher", answer["answered"]),
        ]
        if "processor_ms" in answer:  # a server's is its own
            found.append(one("processor_ms", "ms", "lower", answer["processor_ms"]))
        return found

    run.interleave(f"latency at {rate}/s", model, measure, rounds=1)


def _series(model: Model, opened: OpenEngine, samples: tuple[float, ...], parameters: dict[str, object]) -> Series:
    return Series("latency", "latency_ms", "ms", "lower", model.name, opened.engine.name, (samples,), parameters)
