"""An engine's process, seen from the runner: one request, one answer; stopped while it is not its turn."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3e import M3EError

WORKER = Path(__file__).parent / "engines" / "worker.py"


class EngineError(M3EError):
    """An engine's process failed, fell silent, or answered with an error."""


class EngineProcess:
    """One process that runs an engine.

    It is stopped (SIGSTOP) except while it answers, so that no engine's idle threads spin in another's turn.

    Args:
        python: Interpreter of the engine's environment.
        name: File in engines/.
        threads: Threads that it may use, for the libraries that ask the environment.
        log: File that takes what the engine prints.
        variables: More environment variables.
    """

    def __init__(
        self, python: Path, name: str, threads: int, log: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        # Nothing may reach for a model hub in a measurement.
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= variables or {}
        self.name = name
        self._log = log
        self.started = time.time()
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [str(python), "-P", str(WORKER), name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True,
            )  # fmt: skip
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def request(self, operation: str, /, timeout_s: float = 900, **arguments: Any) -> dict[str, Any]:
        """Ask, and wait for the answer.

        Raises:
            EngineError: With the engine's own message, or the end of its log.
        """
        self._signal(signal.SIGCONT)
        line = json.dumps({"operation": operation, **arguments}) + "\n"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError as error:
            raise EngineError(f"{self.name} has gone: {self._last_words()}") from error
        assert self._process.stdout is not None
        if not self._selector.select(timeout_s):
            self.close()
            raise EngineError(f"{self.name} did not answer {operation!r} within {timeout_s:.0f} s")
        text = self._process.stdout.readline()
        if not text:
            raise EngineError(f"{self.name} ended in {operation!r}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            raise EngineError(answer["error"])
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End the process; safe to call again."""
        self._selector.close()
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
