"""A verified graph -> an onnxruntime session that turns token ids into vectors."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.errors import DependencyError, InferenceError, StartError
from m3e.feeds import Feeds, pad
from m3e.overlap import Workers
from m3e.plan import MAX_BATCH_TOKENS, MAX_SHARED_BATCH_TOKENS, attention_width, plan_batches

Float32Array = npt.NDArray[np.float32]
OUTPUT = "sentence_embedding"

# Batches further apart than this do not belong to one queue.
_APART_S = 0.05
# Threads wait so long for the next operator, or for the text behind a lone one, before they sleep. Left alone they wait
# a million pauses (onnxruntime's pull request 27916): 75 ms of a Zen 3 after every call, of each processor but one.
# Versions before 1.26 do not know the setting.
_SPIN_US = 2000
# After a longer pause they sleep deeply enough that waking them costs more than a few tokens of a small graph on one
# thread: so many tokens, times the bytes of the graph. Twelve of m3e-small's in INT8 are 0.3e9.
_PAUSE_S = 0.02
_BYTES_WORTH_WAKING = 0.5e9
_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"


class Session:
    """One graph opened on the CPU. Safe to call from several threads at once.

    A batch that runs alone gets all threads, which answers it soonest; a few tokens that come after a pause get one,
    for less than waking the others takes. Batches that run side by side get a thread each, which embeds the most texts:
    no thread waits for another, not even where something else takes a processor away for a moment. That takes the
    weights twice. Where batches met a moment ago the next ones will meet too, so they get a thread each from the start.

    Args:
        model: The ONNX file's bytes.
        num_threads: Threads of all calls together. Always set: onnxruntime would count the host's cores and pin
            threads to them, which fails in containers.
        side_by_side: Whether to open the graph for batches side by side as well.
        mixed: Whether the graph gives a text the same vector whatever the width of the rectangle it lies in.
        feed: Lays token ids out as the graph wants them.

    Attributes:
        threads: How many batches to run at once.
        workers: Threads to run them in.
        window: How many texts to tokenise while others run.
        max_batch_tokens: How large a batch is best at most: tokens, each text widened to its width.
        max_shared_batch_tokens: The same of a batch that several callers share and wait for.
        mixed: Whether texts of several widths may share a batch.

    Raises:
        DependencyError: onnxruntime is not installed.
        StartError: onnxruntime refuses the graph.
    """

    device = "cpu"
    window: int | None = 8192
    max_batch_tokens = MAX_BATCH_TOKENS
    max_shared_batch_tokens = MAX_SHARED_BATCH_TOKENS

    def __init__(
        self,
        model: bytes,
        *,
        num_threads: int,
        side_by_side: bool = False,
        mixed: bool = False,
        feed: Callable[..., Feeds] = pad,
    ) -> None:
        self._feed = feed
        self.mixed = mixed
        self.threads = num_threads if side_by_side else 1
        self.workers = Workers(self.threads)
        self._alone = _open(model, num_threads)
        self._beside = _open(model, 1) if self.threads > 1 else self._alone
        self._few_tokens = int(_BYTES_WORTH_WAKING / len(model))
        self._n_running = 0
        self._met_at = self._ran_at = float("-inf")
        self._counting = threading.Lock()
        _return_freed_memory()

    def plan(
        self, n_tokens: npt.NDArray[np.int64], max_batch_size: int | None = None, at_once: int = 1
    ) -> Iterator[npt.NDArray[np.intp]]:
        """Group texts into batches for `run`; see `m3e.plan.plan_batches`."""
        return plan_batches(n_tokens, self.max_batch_tokens, max_batch_size, at_once, mixed=self.mixed)

    def run(
        self,
        input_ids: list[list[int]],
        seq_len: int | None = None,
        output: str = OUTPUT,
        *,
        prompt_length: int = 0,
    ) -> Float32Array:
        """Run one batch.

        Args:
            input_ids: Token ids of each text, special tokens included.
            seq_len: Width to pad to; None for the one that the plan has for the longest text.
            output: Name of the graph's output.
            prompt_length: Tokens at the start of each text that are not pooled; only for models that leave prompts out.

        Returns:
            float32 (batch, dim) for ``sentence_embedding``, (batch, seq_len, hidden_size) for ``last_hidden_state``.

        Raises:
            InferenceError: onnxruntime failed, or gave a value that is not finite.
        """
        if seq_len is None:
            seq_len = attention_width(max(map(len, input_ids)), mixed=self.mixed)
        inputs = self._feed(input_ids, seq_len)
        if prompt_length:
            inputs["prompt_length"] = np.array([prompt_length], dtype=np.int64)
        try:
            with self.side_by_side():
                (result,) = self._choose(sum(map(len, input_ids))).run([output], inputs)
        except Exception as error:
            raise InferenceError(f"onnxruntime failed on a batch of {len(input_ids)} texts: {error}") from error
        return check_finite(result)

    @contextlib.contextmanager
    def side_by_side(self) -> Iterator[None]:
        """Tell that batches are about to run at once: each gets one thread, also the first and the last of them."""
        with self._counting:
            self._n_running += 1
            if self._n_running > 1:
                self._met_at = time.monotonic()
        try:
            yield
        finally:
            with self._counting:
                self._n_running -= 1

    def _choose(self, n_tokens: int) -> Any:
        """The session of all threads, unless batches run at once or just did, or so few tokens come after a pause.

        A queue of batches has moments in which one runs by itself. With all threads it would hold up the next.
        """
        now = time.monotonic()
        queued = self._n_running > 1 or now - self._met_at <= _APART_S
        paused, self._ran_at = now - self._ran_at > _PAUSE_S, now
        return self._beside if queued or (paused and n_tokens <= self._few_tokens) else self._alone

    def abandon(self) -> None:
        """Never close this session: in a forked child its threads do not exist, and closing would wait for them."""
        for session in (self._alone, self._beside):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


def _open(model: bytes, num_threads: int) -> Any:
    """Open a graph with so many threads."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.dynamic_block_base", "4")  # a thread that was held up holds up less
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    # The graph is final: higher levels would fuse it back into slower operators.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4  # errors are raised; where memory is short, writing them too ends the process
    try:
        # Without its own fall-back, which would print to stdout and open the graph once more.
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise StartError(f"onnxruntime {onnxruntime.__version__} cannot open the graph: {error}") from error
    session._model_bytes = None  # kept for the fall-back alone
    return session


def check_finite(vectors: Float32Array) -> Float32Array:
    """Let vectors through that are finite.

    Raises:
        InferenceError: They are not.
    """
    if not np.isfinite(vectors).all():
        raise InferenceError("the model gave values that are not finite; its weights are damaged or overflow")
    return vectors


def _return_freed_memory() -> None:
    """Give what loading has freed back to the system; glibc would keep it for itself."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def import_onnxruntime() -> Any:
    """Import onnxruntime with its telemetry off, or say what to install.

    Since 1.29 its official builds write events about sessions into a database of the user's and send them to its maker,
    unless ``ORT_DISABLE_TELEMETRY`` is set when it loads (onnxruntime's Privacy.md). Whoever has set that variable, to
    whatever, has decided; whoever loaded onnxruntime before us at least sends nothing about our sessions.

    Raises:
        DependencyError: It is not installed.
    """
    undecided = _NO_TELEMETRY not in os.environ
    if undecided:
        os.environ[_NO_TELEMETRY] = "1"
    try:
        import onnxruntime

        if undecided:
            onnxruntime.disable_telemetry_events()
    except ImportError as error:
        raise DependencyError(
            "onnxruntime is not installed; install one of: "
            'pip install "m3e-runtime[cpu]" or pip install "m3e-runtime[gpu]"'
        ) from error
    finally:
        if undecided:
            del os.environ[_NO_TELEMETRY]
    return onnxruntime
