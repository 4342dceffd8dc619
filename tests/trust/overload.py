"""The service under more than it can do: it answers about its health, and is soon well again."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks import open_loop
from benchmarks.closed_loop import capacity_per_s
from benchmarks.server_process import COMMAND, running
from tests.trust import Figure, Outcome
from tests.trust.careless_server import careless
from tests.trust.models import small_bundle

_TEXTS = [f"今天天气真好 {i}" for i in range(500)]
_LONGEST = ["天" * 510] * 512  # 512 tokens each
_MOST_HEALTH_MS = 20
_CALM_S, _STORM_S = 10, 10
_MOST_RECOVERY_S = 2.0


def probe_ms(port: int, seconds: float) -> float:
    """p99 of a check whether the server lives, fifty times a second; infinite if one had another answer than 200."""
    times = np.arange(0, seconds, 0.02).tolist()
    found = open_loop.send(port, [b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"], times)
    return _p99_ms(found) if all(each.status == 200 for each in found) else float("inf")


def _p99_ms(outcomes: list[open_loop.Outcome]) -> float:
    return float(np.percentile([each.seconds for each in outcomes], 99)) * 1000


def health_ms(seconds: float, command: tuple[str, ...] = COMMAND) -> tuple[float, float]:
    """At five times the capacity, and beside 512 texts of 512 tokens."""
    with running(small_bundle(), command=command) as server, ThreadPoolExecutor(1) as pool:
        rate_per_s = 5 * capacity_per_s(server.port, _TEXTS)
        storm = pool.submit(open_loop.open_loop, server.port, _TEXTS, rate_per_s=rate_per_s, seconds=seconds + 2)
        time.sleep(1)  # until its process sends
        in_storm = probe_ms(server.port, seconds)
        storm.result()
        longest = pool.submit(server.post, "/embed", {"inputs": _LONGEST}, timeout=120)
        return in_storm, probe_ms(server.port, 5) if not longest.done() else float("nan")


def measure_health(count: int) -> Outcome:
    """So many seconds of overload; the mistake takes a few."""
    found = health_ms(count)
    careless_ms = health_ms(min(count, 5), careless("health asks the model"))
    return Outcome(
        f"{found[0]:.1f} ms at five times the capacity for {count} s, {found[1]:.1f} ms beside 512 texts of 512 tokens",
        max(found) <= _MOST_HEALTH_MS,
        {"health asks the model": max(careless_ms) > _MOST_HEALTH_MS},
    )


def recovery_s(*arguments: object) -> float:
    """Seconds after a storm until a second begins whose p99 is within a tenth of what it was before, or infinity."""
    with running(small_bundle(), *arguments) as server:
        capacity = capacity_per_s(server.port, _TEXTS)
        rates = [(0.5 * capacity, _CALM_S), (3 * capacity, _STORM_S), (0.5 * capacity, _CALM_S)]
        outcomes = open_loop.phases(server.port, _TEXTS, rates)
    n_calm, n_after = (round(rate * seconds) for rate, seconds in (rates[0], rates[2]))
    calm_s = _p99_ms(outcomes[:n_calm]) / 1000
    after = outcomes[-n_after:]
    since = np.array([each.due_s for each in after]) - after[0].due_s
    seconds = np.array([each.seconds if each.status == 200 else np.inf for each in after])
    for start in np.arange(0, _CALM_S - 1, 0.1):
        # Between two that were refused there is no number.
        if np.percentile(seconds[(since >= start) & (since < start + 1)], 99, method="higher") <= 1.1 * calm_s:
            return float(start)
    return float("inf")


def measure_recovery(count: int) -> Outcome:
    """So many storms; the median, since processors that others share change their speed within seconds."""
    found = sorted(recovery_s() for _ in range(count))
    unbounded = recovery_s("--max-queue-ms", "0")
    median = found[len(found) // 2]
    return Outcome(
        f"{median:.1f} s ({found[0]:.1f} to {found[-1]:.1f} s, {count} storms)",
        median <= _MOST_RECOVERY_S,
        {"a queue without a bound on the wait": unbounded > _MOST_RECOVERY_S},
    )


FIGURES = (
    Figure(
        "C6", "seconds after a storm until p99 is within a tenth of what it was", "<= 2 s",
        measure_recovery, long=1, soak=3,
    ),
    Figure(
        "C11", "p99 of /health/live at five times the capacity and beside 512 texts of 512 tokens", "<= 20 ms",
        measure_health, long=15, soak=60,
    ),
)  # fmt: skip
