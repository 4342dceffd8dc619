"""Records made up for the tests of the benchmark suite."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from m3e_bench.record import Series


def series(
    engine: str, samples: Sequence[Sequence[float]], metric: str = "sentences_per_s", *, question: str = "throughput",
    unit: str = "1/s", better: str = "higher", **parameters: Any,
) -> Series:  # fmt: skip
    """A series of the tiny model."""
    rounds = tuple(tuple(group) for group in samples)
    return Series(question, metric, unit, better, "m3e-tiny", engine, rounds, parameters or {"workload": "lcqmc"})


def waits(engine: str, samples: Sequence[Sequence[float]]) -> Series:
    """Waiting times of single texts."""
    return series(
        engine, samples, "latency_ms", question="latency", unit="ms", better="lower",
        loop="closed", length_tokens=12, batch_size=1,
    )  # fmt: skip


def make_content(found: Sequence[Series]) -> dict[str, Any]:
    """A whole record around some series."""
    names = dict.fromkeys(one.engine for one in found)
    return {
        "schema_version": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "settings": {
            "threads": 2, "quick": True, "budget": {"rounds": 3}, "parts": {}, "bound_batches": {},
        },
        "code": {"version": "0.1.0", "commit": None, "changed_files": 0, "packages": {"numpy": "2.0"}},
        "machine": {
            "cpu": "a processor", "architecture": "x86_64", "isa": ["avx2"], "host_cpus": 2, "available_cpus": 2,
            "cgroup_cpu_max": None, "memory_bytes": 8 * 10**9, "kernel": "6.0", "python": "3.11.7",
        },
        "models": {
            "m3e-tiny": {"weights": "random", "sha256": "0" * 64, "layers": 2, "hidden_size": 64, "vocab_size": 21128},
        },
        "workloads": {"lcqmc": {"source": "questions", "texts": 2000, "sha256": "1" * 64}},
        "data_sha256": {},
        "engines": {
            name: {
                "title": name.upper(), "precision": name.rpartition("-")[2], "ours": name.startswith("m3e"),
                "versions": {"python": "3.11.7"}, "problems": [],
            }
            for name in names
        },
        "series": [{**dataclasses.asdict(one), "samples": [list(group) for group in one.samples]} for one in found],
    }  # fmt: skip
