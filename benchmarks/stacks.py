"""What a request costs on each server and framework that the service could be built on, before any of its own work.

Every stack answers the same small request (`benchmarks.stack_apps`) on one processor, wrk asks from another: its
requests/s over 64 connections, and the p50 of one connection. Stacks take turns. Writes
``benchmarks/results/stacks.json``, which docs/serving.md quotes. Needs two processors, Linux and wrk.

  python -m benchmarks.stacks
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.closed_loop import http_call, p50_s, wrk
from benchmarks.stack_apps import STACKS
from m3e_bench.environments import interpreter
from m3e_bench.machine import describe_code, describe_machine

RECORD = Path(__file__).parent / "results" / "stacks.json"
_APPS = Path(__file__).with_name("stack_apps.py")
_WORK = Path(__file__).parents[1] / ".bench"
_PATH = "/v1/embeddings"
_TEXT = "今天天气真好我们去公园"


@contextlib.contextmanager
def serving(python: Path, stack: str, processor: int) -> Iterator[int]:
    """One stack on a processor, and the port that it listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    process = subprocess.Popen(
        ["taskset", "-c", str(processor), str(python), str(_APPS), stack, str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=_APPS.parent,
    )  # fmt: skip
    try:
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            if time.monotonic() > until or process.poll() is not None:
                raise SystemExit(f"{stack} does not answer; try: {python} {_APPS} {stack!r} {port}")
            time.sleep(0.1)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # some serve from a child
        process.wait()


def measure(python: Path, *, rounds: int, seconds: float) -> dict[str, dict[str, float | list[float]]]:
    """Medians for every stack over rounds in which each has a turn."""
    own, other = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {own})  # wrk inherits it
    per_s: dict[str, list[float]] = {stack: [] for stack in STACKS}
    p50_ms: dict[str, list[float]] = {stack: [] for stack in STACKS}
    for _ in range(rounds):
        for stack in STACKS:
            with serving(python, stack, other) as port:
                wrk(port, [_TEXT], seconds=1, path=_PATH)
                per_s[stack].append(wrk(port, [_TEXT], seconds=seconds, path=_PATH)["per_s"])
                p50_ms[stack].append(p50_s(http_call(port, _TEXT)) * 1e3)
            print(f"{stack}: {per_s[stack][-1]:,.0f}/s, p50 {p50_ms[stack][-1]:.2f} ms", file=sys.stderr)
    return {
        stack: {
            "per_s": statistics.median(per_s[stack]),
            "p50_ms": statistics.median(p50_ms[stack]),
            "rounds_per_s": per_s[stack],
        }
        for stack in STACKS
    }


def main() -> None:
    """Measure all of them and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stacks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="in which every stack has a turn")
    parser.add_argument("--seconds", type=float, default=4, help="of a turn")
    parser.add_argument("--output", type=Path, default=RECORD)
    parsed = parser.parse_args()
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "code": describe_code(),
        "packages": "benchmarks/m3e_bench/environments/stacks.txt",
        "stacks": measure(interpreter("stacks", _WORK), rounds=parsed.rounds, seconds=parsed.seconds),
    }
    parsed.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
