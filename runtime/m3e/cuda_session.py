"""A verified graph -> an onnxruntime session on an NVIDIA card, through the CUDA provider."""

from __future__ import annotations

import contextlib
import queue
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.cuda_graphs import CudaGraphs
from m3e.errors import InferenceError, StartError
from m3e.feeds import Feeds, pack
from m3e.gpu import PinnedBuffer, size_of
from m3e.manifest import Model
from m3e.overlap import Workers
from m3e.plan import plan_sorted
from m3e.providers import CUDA, cuda_options, cuda_runtime, open_on_gpu
from m3e.session import OUTPUT, Float32Array, check_finite

# What a batch may take of the card; another process may want the rest.
_MEMORY_SHARE = 0.2
_MOST_TOKENS = 32768


class CardSession:
    """What the sessions on a card have in common: two batches are under way, and more texts tokenised meanwhile.

    Args:
        device_id: Which card.
        dim: Length of a vector.
        max_batch_tokens: Upper bound on rows x longest row of a batch.
    """

    threads = 2  # while one waits for Python, the card works for the other
    window: int | None = 2048
    mixed = True  # the plan sorts by length and bounds the pads

    def __init__(self, device_id: int, dim: int, max_batch_tokens: int) -> None:
        self.max_batch_tokens = self.max_shared_batch_tokens = max_batch_tokens
        self.workers = Workers(self.threads)
        self._dim = dim
        self._most_rows = max(1, max_batch_tokens // 8)
        # Four arrays of int32, or two of int64, over at most every cell of the rectangle; and the vectors.
        size, cudart = 16 * max_batch_tokens + 4 * dim * self._most_rows + (1 << 16), cuda_runtime(device_id)
        self._buffers: queue.SimpleQueue[PinnedBuffer] = queue.SimpleQueue()
        for _ in range(self.threads + 1):
            self._buffers.put(PinnedBuffer(size, cudart))

    def side_by_side(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to prepare: the card shares itself out."""
        return contextlib.nullcontext()

    def abandon(self) -> None:
        """Refuse: a forked child cannot use its parent's card.

        Raises:
            StartError: Always.
        """
        raise StartError("CUDA does not survive a fork; start child processes with 'spawn' or 'forkserver'")

    def _run_on(self, session: Any, feeds: Feeds, rows: int) -> Float32Array:
        """Copy from and to page-locked memory; as many calls at a time as there are buffers.

        Binding an input copies it to the card and returns when it is there, and a run ends when its output is in place.
        IOBinding's own synchronisation would wait for everything on the card (cudaDeviceSynchronize): for the batch
        beside this one.
        """
        shapes = [*((array.shape, array.dtype) for array in feeds.values()), ((rows, self._dim), np.dtype(np.float32))]
        with self._buffer(size_of(shapes)) as buffer:
            *staged, out = buffer.views(shapes)
            binding = session.io_binding()
            for (name, array), view in zip(feeds.items(), staged, strict=True):
                view[...] = array
                binding.bind_input(name, "cpu", 0, view.dtype.type, view.shape, view.ctypes.data)
            binding.bind_output(OUTPUT, "cpu", 0, np.float32, out.shape, out.ctypes.data)
            session.run_with_iobinding(binding)
            return np.array(out, dtype=np.float32)

    @contextlib.contextmanager
    def _buffer(self, size_bytes: int) -> Iterator[PinnedBuffer]:
        buffer = self._buffers.get()
        if size_bytes > buffer.size_bytes:  # a batch that `plan` did not make
            self._buffers.put(buffer)
            yield PinnedBuffer(size_bytes, None)
            return
        try:
            yield buffer
        finally:
            self._buffers.put(buffer)


class CudaSession(CardSession):
    """One graph opened on a card. Safe to call from several threads at once.

    Args:
        model: The ONNX file's bytes.
        model_facts: The model's sizes, which say what a token takes of the card's memory.
        device_id: Which card.
        memory_bytes: The card's memory.
        feed: Lays token ids out as the graph wants them.
        cuda_graphs: Capture the runs of small batches; the graph must be packed. Takes its weights a second time.

    Raises:
        DependencyError: onnxruntime has no CUDA provider.
        StartError: The provider did not load, or refuses the graph.

    Warns:
        RuntimeWarning: Runs cannot be captured here; small batches are slower.
    """

    device = "cuda"

    def __init__(
        self,
        model: bytes,
        model_facts: Model,
        *,
        device_id: int,
        memory_bytes: int,
        feed: Callable[[Sequence[Sequence[int]]], Feeds] = pack,
        cuda_graphs: bool = True,
    ) -> None:
        self._feed = feed
        self._session = open_on_gpu(model, CUDA, cuda_options(device_id, cuda_graphs=False))
        super().__init__(device_id, model_facts.embedding_dim, batch_tokens(model_facts, memory_bytes))
        self._graphs: CudaGraphs | None = None
        if cuda_graphs:
            try:
                self._graphs = CudaGraphs(
                    model, device_id=device_id, max_seq_length=model_facts.max_seq_length, dim=self._dim
                )
            except Exception as error:  # onnxruntime's exceptions share no base class
                warnings.warn(f"CUDA graphs are off, small batches take longer: {error}", RuntimeWarning, stacklevel=2)

    def plan(
        self, n_tokens: npt.NDArray[np.int64], max_batch_size: int | None = None, at_once: int = 1
    ) -> Iterator[npt.NDArray[np.intp]]:
        """Group texts into batches for `run`, sized to the card's memory."""
        most_rows = self._most_rows if max_batch_size is None else min(self._most_rows, max_batch_size)
        return plan_sorted(n_tokens, self.max_batch_tokens, most_rows)

    def run(self, input_ids: list[list[int]], *, prompt_length: int = 0) -> Float32Array:
        """Run one batch.

        Args:
            input_ids: Token ids of each text, special tokens included.
            prompt_length: Tokens at the start of each text that are not pooled; only for models that leave prompts out.

        Returns:
            float32 (batch, dim).

        Raises:
            InferenceError: onnxruntime failed, or gave a value that is not finite.
        """
        try:
            vectors = None if self._graphs is None else self._graphs.run(input_ids)
            if vectors is None:
                feeds = self._feed(input_ids)
                if prompt_length:
                    feeds["prompt_length"] = np.array([prompt_length], dtype=np.int64)
                vectors = self._run_on(self._session, feeds, len(input_ids))
        except Exception as error:
            raise InferenceError(f"onnxruntime failed on a batch of {len(input_ids)} texts: {error}") from error
        return check_finite(vectors)


def batch_tokens(model: Model, memory_bytes: int) -> int:
    """How many tokens a batch may have on a card: what the activations of a token take, into a share of its memory."""
    # Alive at once in a layer: input, Q, K, V, context and sums, and the inner activation twice, FP16; pooling's FP32.
    token_bytes = 2 * (8 * model.hidden_size + 2 * model.intermediate_size) + 3 * 4 * model.hidden_size
    fitting = int(_MEMORY_SHARE * memory_bytes) // token_bytes
    return max(model.max_seq_length, min(_MOST_TOKENS, fitting))
