"""The process in which one engine runs: reads requests as JSON lines, answers each with one.

Run by path, ``python -P worker.py NAME``, in the engine's own environment; the standard library and numpy are all it
needs. What libraries print goes to standard error.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import queue
import random
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any


class Worker:
    """Answers requests for one engine.

    Args:
        name: Name of the file in this folder that has the engine.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._engine: Any = None
        self._texts: dict[str, list[str]] = {}

    def versions(self) -> dict[str, Any]:
        """Versions of the packages that do the engine's work."""
        packages = self._module().Engine.PACKAGES
        return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in packages}}

    def prepare(self, checkpoint: str, folder: str, calibration: list[str], options: dict[str, Any]) -> dict[str, Any]:
        """Convert a checkpoint; not part of any measurement."""
        self._module().Engine.prepare(Path(checkpoint), Path(folder), calibration, **options)
        return {}

    def load(self, checkpoint: str, folder: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Open the model."""
        self._engine = None
        self._engine = self._module().Engine(Path(checkpoint), Path(folder), threads, **options)
        return {}

    def first_vector(self, checkpoint: str, folder: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Open the model, embed one text, and say when that was done, in seconds since the epoch."""
        self.load(checkpoint, folder, threads, options)
        self._engine.encode(["今天天气真好，我们去公园。"])
        return {"time": time.time(), **self.memory()}

    def texts(self, name: str, texts: list[str]) -> dict[str, Any]:
        """Keep texts under a name for the requests to come."""
        self._texts[name] = texts
        return {}

    def encode(self, name: str) -> dict[str, Any]:
        """Embed texts in one call, and time it."""
        texts = self._texts[name]
        begin = time.perf_counter()
        self._engine.encode(texts)
        return {"seconds": time.perf_counter() - begin}

    def latency(self, name: str, count: int, batch_size: int, start: int = 0) -> dict[str, Any]:
        """Closed loop: the next request is sent when the last one is answered."""
        texts = self._texts[name]
        milliseconds = []
        for i in range(start, start + count):
            batch = [texts[(i * batch_size + j) % len(texts)] for j in range(batch_size)]
            begin = time.perf_counter()
            self._engine.encode(batch)
            milliseconds.append((time.perf_counter() - begin) * 1e3)
        return {"milliseconds": milliseconds}

    def open_loop(self, name: str, rate: float, seconds: float, seed: int) -> dict[str, Any]:
        """Open loop: requests of one text at random times (Poisson), each timed from when it was meant to be sent.

        So a request that waits behind a slow one counts its wait. An engine that cannot keep up is stopped at twice
        the time; what is unanswered then counts as answered at that moment, which understates it.

        The processor time of this process counts everything from the first request on, also threads that wait awake.
        """
        random_ = random.Random(seed)
        intended, at = [], 0.0
        while (at := at + random_.expovariate(rate)) < seconds:
            intended.append(at)
        texts = self._texts[name]
        answered: dict[int, float] = {}
        waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        stop = threading.Event()

        def serve() -> None:
            while (i := waiting.get()) is not None:
                if not stop.is_set():
                    self._engine.encode([texts[i % len(texts)]])
                    answered[i] = time.perf_counter() - begin

        # A library answers one caller after another; a server is asked by as many at once as there are requests.
        servers = [threading.Thread(target=serve) for _ in range(getattr(self._engine, "CONCURRENT_REQUESTS", 1))]
        begin, spent_s = time.perf_counter(), time.process_time()
        for thread in servers:
            thread.start()
        for i, moment in enumerate(intended):
            time.sleep(max(0.0, begin + moment - time.perf_counter()))
            waiting.put(i)
        for _ in servers:
            waiting.put(None)
        for thread in servers:
            thread.join(max(0.0, begin + 2 * seconds - time.perf_counter()))
        done = dict(answered)
        stop.set()
        for thread in servers:
            thread.join()
        end = max(2 * seconds, *done.values()) if len(done) < len(intended) else 0.0
        milliseconds = [(done.get(i, end) - moment) * 1e3 for i, moment in enumerate(intended)]
        answer = {"milliseconds": milliseconds, "answered": len(done) / max(1, len(intended))}
        if getattr(self._engine, "IN_PROCESS", True):
            answer["processor_ms"] = (time.process_time() - spent_s) * 1e3 / max(1, len(answered))
        return answer

    def vectors(self, name: str, path: str) -> dict[str, Any]:
        """Embed texts and write the vectors as an .npy file."""
        import numpy as np

        np.save(path, np.asarray(self._engine.encode(self._texts[name]), dtype=np.float32))
        return {}

    def memory(self) -> dict[str, Any]:
        """Resident memory of this process, now and at its highest (Linux: proc(5), VmRSS and VmHWM)."""
        if not getattr(self._engine, "IN_PROCESS", True):
            return {"resident_bytes": None, "peak_bytes": None}
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {
            "resident_bytes": int(status["VmRSS"].split()[0]) * 1024,
            "peak_bytes": int(status["VmHWM"].split()[0]) * 1024,
        }

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call a method that only this engine has."""
        answer: dict[str, Any] = getattr(self._engine, method)(**arguments)
        return answer

    def _module(self) -> types.ModuleType:
        return importlib.import_module(f"m3e_bench.engines.{self._name}")


def main() -> None:
    """Answer until standard input ends."""
    _die_with_parent()
    # The package without its place on sys.path: in the wheel that would be site-packages, and lend an engine ours.
    package = types.ModuleType("m3e_bench")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["m3e_bench"] = package
    # Answers go where standard output went; prints of libraries must not mix with them.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        operation: Callable[..., dict[str, Any]] = getattr(worker, request.pop("operation"))
        try:
            answer = operation(**request)
        except Exception as error:  # whatever an engine raises is its answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _die_with_parent() -> None:
    """Ask Linux to end this process with its parent (prctl(2), PR_SET_PDEATHSIG = 1), stopped or not."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
