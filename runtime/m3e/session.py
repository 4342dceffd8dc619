"""A verified graph -> an onnxruntime session that turns token ids into vectors."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.errors import DependencyError, InferenceError, StartError
from m3e.feeds import Feeds, pad
from m3e.plan import attention_length, plan_batches

Float32Array = npt.NDArray[np.float32]

# Bounds the memory of a batch.
_MAX_BATCH_TOKENS = 1024


class Session:
    """One graph opened on the CPU. Safe to call from several threads at once.

    Args:
        model: The ONNX file's bytes.
        num_threads: Threads of one call. Always set: onnxruntime would count the host's cores and pin threads to
            them, which fails in containers.
        feed: Lays token ids out as the graph wants them.

    Attributes:
        threads: How many batches to run at once.
        window: How many texts to tokenise while others run; None for all of them before any.

    Raises:
        DependencyError: onnxruntime is not installed.
        StartError: onnxruntime refuses the graph.
    """

    device = "cpu"
    threads = 1
    window: int | None = None

    def __init__(self, model: bytes, *, num_threads: int, feed: Callable[..., Feeds] = pad) -> None:
        self._feed = feed
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        # The graph is final: higher levels would fuse it back into slower operators.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.log_severity_level = 3  # errors; they are raised as well
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise StartError(f"onnxruntime {onnxruntime.__version__} cannot open the graph: {error}") from error
        # Without a fallback provider the file's bytes need not stay; onnxruntime keeps them for that alone.
        self._session.disable_fallback()
        self._session._model_bytes = None
        _return_freed_memory()

    def plan(
        self, n_tokens: npt.NDArray[np.int64], max_batch_size: int | None = None
    ) -> Iterator[npt.NDArray[np.intp]]:
        """Group texts into batches for `run`; see `m3e.plan.plan_batches`."""
        return plan_batches(n_tokens, _MAX_BATCH_TOKENS, max_batch_size)

    def run(
        self,
        input_ids: list[list[int]],
        seq_len: int | None = None,
        output: str = "sentence_embedding",
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
            seq_len = int(attention_length(np.array([max(map(len, input_ids))]))[0])
        inputs = self._feed(input_ids, seq_len)
        if prompt_length:
            inputs["prompt_length"] = np.array([prompt_length], dtype=np.int64)
        try:
            (result,) = self._session.run([output], inputs)
        except Exception as error:
            raise InferenceError(f"onnxruntime failed on a batch of {len(input_ids)} texts: {error}") from error
        return check_finite(result)

    def abandon(self) -> None:
        """Never close this session: in a forked child its threads do not exist, and closing would wait for them."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))


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
    """Import onnxruntime, or say what to install.

    Raises:
        DependencyError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            "onnxruntime is not installed; install one of: "
            'pip install "m3e-runtime[cpu]" or pip install "m3e-runtime[gpu]"'
        ) from error
    return onnxruntime
