"""A verified graph -> TensorRT engines, through onnxruntime's provider.

One narrow engine serves its range of shapes better than a wide one, and onnxruntime runs every shape of a session with
one set of kernels, so each profile has a session of its own. That costs the weights once for each on the card.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.cuda_session import CardSession, batch_tokens
from m3e.errors import InferenceError, StartError
from m3e.feeds import rectangle
from m3e.manifest import Model
from m3e.plan import plan_sorted
from m3e.providers import TENSORRT, open_on_gpu, tensorrt_options
from m3e.session import Float32Array, check_finite

# Lengths at which one engine ends and the next begins.
_EDGES = (32, 128)
# The most rows that the engine for a few texts takes.
_FEW = 4
_MOST_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Profile:
    """The shapes that one engine serves, and the one it is made for.

    Attributes:
        rows: Fewest, best and most texts.
        seq_len: Shortest, best and longest padded length.
    """

    rows: tuple[int, int, int]
    seq_len: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.rows[0]}-{self.rows[2]}x{self.seq_len[0]}-{self.seq_len[2]}"

    def shapes(self) -> dict[str, str]:
        """The shapes in the TensorRT provider's words, by ``min``, ``opt`` and ``max``."""
        ends = zip(("min", "opt", "max"), self.rows, self.seq_len, strict=True)
        return {end: f"input_ids:{rows}x{seq_len},lengths:{rows}" for end, rows, seq_len in ends}

    def takes(self, rows: int, seq_len: int) -> bool:
        """Whether a batch of this shape is served."""
        return self.rows[0] <= rows <= self.rows[2] and self.seq_len[0] <= seq_len <= self.seq_len[2]


def profiles(max_batch_tokens: int, max_seq_length: int) -> tuple[Profile, ...]:
    """Derive the profiles from the batches that `TensorrtSession.plan` makes: every one of them is served by one.

    Args:
        max_batch_tokens: Upper bound on rows x longest row.
        max_seq_length: The longest text.

    Returns:
        The engine for a few texts of any length first, then one for each range of lengths.
    """
    few = min(_FEW, max(1, max_batch_tokens // max_seq_length))
    found = [Profile((1, 1, few), (1, min(32, max_seq_length), max_seq_length))]
    shortest = 1
    for longest in edges(max_seq_length):
        most = max(1, max_batch_tokens // longest)
        found.append(Profile((1, most, most), (shortest, longest, longest)))
        shortest = longest + 1
    return tuple(found)


def edges(max_seq_length: int) -> list[int]:
    """Lengths at which one engine ends and the next begins, the longest text last."""
    return sorted({min(edge, max_seq_length) for edge in (*_EDGES, max_seq_length)})


class TensorrtSession(CardSession):
    """One graph as TensorRT engines. Safe to call from several threads at once.

    Opening takes minutes where an engine is missing from the folder, seconds where they are all there.

    Args:
        model: The ONNX file's bytes.
        model_facts: The model's sizes.
        device_id: Which card.
        memory_bytes: The card's memory.
        folder: Engines are read from here, and written here if they are missing.
        progress: Called with a line of text before each engine.

    Raises:
        DependencyError: onnxruntime has no TensorRT provider.
        StartError: The provider did not load, or could not build an engine.
    """

    device = "tensorrt"

    def __init__(
        self,
        model: bytes,
        model_facts: Model,
        *,
        device_id: int,
        memory_bytes: int,
        folder: Path,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(device_id, model_facts.embedding_dim, max_tokens(model_facts, memory_bytes))
        self._edges = edges(model_facts.max_seq_length)
        self._sessions: list[tuple[Profile, Any]] = []
        found = profiles(self.max_batch_tokens, model_facts.max_seq_length)
        for number, profile in enumerate(found, start=1):
            progress(f"engine {number} of {len(found)}: {profile}")
            own = folder / f"engine_{number}"
            own.mkdir(mode=0o700, exist_ok=True)
            options = tensorrt_options(device_id, own, folder, profile.shapes())
            # The provider builds here, because every input has a profile.
            self._sessions.append((profile, open_on_gpu(model, TENSORRT, options, whole=True)))
            if not list(own.glob("*.engine")):
                raise StartError(f"TensorRT left no engine for {profile} in {str(own)!r}")
            self.run_profile(number - 1, [[0] * profile.seq_len[0]])  # what a first run sets up is no request's wait

    def plan(
        self, n_tokens: npt.NDArray[np.int64], max_batch_size: int | None = None, at_once: int = 1
    ) -> Iterator[npt.NDArray[np.intp]]:
        """Group texts into batches that one engine serves each."""
        return plan_sorted(n_tokens, self.max_batch_tokens, max_batch_size, self._edges)

    def run(self, input_ids: list[list[int]], *, prompt_length: int = 0) -> Float32Array:
        """Run one batch.

        Args:
            input_ids: Token ids of each text, special tokens included.
            prompt_length: 0; there are no graphs for TensorRT that leave prompts out of the pooling.

        Returns:
            float32 (batch, dim).

        Raises:
            InferenceError: onnxruntime failed, gave a value that is not finite, or no engine serves the shape.
        """
        assert not prompt_length
        rows, seq_len = len(input_ids), max(map(len, input_ids))
        for number, (profile, _) in enumerate(self._sessions):
            if profile.takes(rows, seq_len):
                return self.run_profile(number, input_ids)
        served = ", ".join(str(profile) for profile, _ in self._sessions)
        raise InferenceError(f"no engine serves {rows} texts of {seq_len} tokens; there are {served}")

    def run_profile(self, number: int, input_ids: list[list[int]]) -> Float32Array:
        """Run one batch on a certain engine."""
        _, session = self._sessions[number]
        try:
            vectors = self._run_on(session, rectangle(input_ids), len(input_ids))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise InferenceError(f"TensorRT failed on a batch of {len(input_ids)} texts: {error}") from error
        return check_finite(vectors)


def max_tokens(model_facts: Model, memory_bytes: int) -> int:
    """Upper bound on rows x longest row of a batch; see `m3e.cuda_session.batch_tokens`."""
    return min(_MOST_TOKENS, batch_tokens(model_facts, memory_bytes))


class EngineBuild:
    """Engines being built in a thread while another session serves.

    Args:
        build: Gives the finished session; takes minutes.
        check: Raises if the session gives other vectors than it should.
        swap: Called with the session when it is built and checked, and never otherwise.

    Attributes:
        state: ``building``, ``ready`` or ``failed``.
        error: Why it failed.
    """

    def __init__(self, build: Callable[[], Any], check: Callable[[Any], object], swap: Callable[[Any], None]) -> None:
        self.state = "building"
        self.error: Exception | None = None
        self._work = build, check, swap
        self._thread = threading.Thread(target=self._run, name="m3e-engine-build", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        build, check, swap = self._work
        try:
            session = build()
            check(session)
            swap(session)
            self.state = "ready"
        except Exception as error:
            self.error, self.state = error, "failed"

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the engines serve.

        Raises:
            StartError: They could not be built or failed their check, or the time is over.
        """
        self._thread.join(timeout_s)
        if self.state == "building":
            raise StartError(f"the engines are not built after {timeout_s} s; they still build")
        if self.error is not None:
            if isinstance(self.error, StartError):
                raise self.error
            raise StartError(f"the engines could not be built: {self.error}") from self.error
