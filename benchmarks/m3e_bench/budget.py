"""How much a run measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds of a run; every engine gets the same.

    Attributes:
        rounds: Turns of each engine for each figure; the engines take them in turn.
        turn_s: Longest turn of the slowest engine; of a longer workload a part is encoded.
        least_batches: Of the peers' 32 texts, that a part of a workload has at least.
        figure_s: Time of all turns for one workload; more turns than two are left out beyond it.
        latency_turn_s: Time of a turn of single requests.
        latency_cases: Tokens of a text and texts of a request, closed loop.
        rates_per_s: Requests a second, open loop.
        open_loop_s: Time of each rate.
        cold_starts: Processes started.
        lengths: Tokens, for throughput by length; on the first model.
        accuracy_texts: Sentences, or labelled pairs of a set, that vectors are compared on; None for 1000 and for all.
        corpus_sizes: Texts, for scaling by size of the corpus.
        bound_workloads: Workloads that are measured against the bound.
    """

    rounds: int = 5
    turn_s: float = 3.0
    least_batches: int = 4  # batches differ most in a workload with few long texts
    figure_s: float = 120.0
    latency_turn_s: float = 0.6
    latency_cases: tuple[tuple[int, int], ...] = ((12, 1), (12, 8), (128, 1))
    rates_per_s: tuple[int, ...] = (20, 100)
    open_loop_s: float = 2.0
    cold_starts: int = 3
    lengths: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    accuracy_texts: int | None = None
    corpus_sizes: tuple[int, ...] = (100, 1000, 10000)
    bound_workloads: int = 2


FULL = Budget()
QUICK = Budget(
    rounds=3,
    turn_s=0.7,
    least_batches=1,
    figure_s=12.0,
    latency_turn_s=0.2,
    latency_cases=((12, 1),),
    rates_per_s=(50,),
    open_loop_s=1.0,
    cold_starts=1,
    lengths=(16, 128, 512),
    accuracy_texts=100,
    corpus_sizes=(100, 1000),
    bound_workloads=1,
)
