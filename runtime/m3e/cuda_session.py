"""A verified graph -> an onnxruntime session on an NVIDIA card, through the CUDA provider."""

from __future__ import annotations

import contextlib
import queue
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.errors import InferenceError, StartError
from m3e.feeds import Feeds, pack
from m3e.gpu import PinnedBuffer, size_of
from m3e.manifest import Model
from m3e.plan import plan_sorted
from m3e.providers import CUDA, cuda_options, cuda_runtime, open_on_gpu
from m3e.session import Float32Array, check_finite, import_onnxruntime

OUTPUT = "sentence_embedding"
# What a batch may take of the card; another process may want the rest.
_MEMORY_SHARE = 0.2
_MOST_TOKENS = 32768


@dataclass(frozen=True, slots=True)
class Bucket:
    """A shape whose run is captured: up to ``rows`` texts of up to ``width`` tokens, ``tokens`` in all.

    What the texts leave of the tokens goes to rows of its own, so that every number in the graph is the same each time.
    """

    rows: int
    width: int
    tokens: int

    @property
    def fill_rows(self) -> int:
        """Rows that can take all of the tokens up."""
        return -(-self.tokens // self.width)

    def fits(self, input_ids: Sequence[Sequence[int]]) -> bool:
        """Whether the texts fit, and a token is left for each row that is not theirs."""
        others = self.rows - len(input_ids) + self.fill_rows
        return (
            len(input_ids) <= self.rows
            and max(map(len, input_ids)) <= self.width
            and sum(map(len, input_ids)) + others <= self.tokens
        )

    def feeds(self, input_ids: Sequence[Sequence[int]]) -> Feeds:
        """The packed inputs, filled up to the bucket's shape."""
        lengths = [1] * (self.rows - len(input_ids) + self.fill_rows)
        left = self.tokens - sum(map(len, input_ids)) - len(lengths)
        for k in range(len(lengths) - self.fill_rows, len(lengths)):
            lengths[k] += min(left, self.width - 1)
            left -= lengths[k] - 1
        return pack([*input_ids, *([0] * length for length in lengths)], self.width)


# One text, and what a service collects in a moment.
BUCKETS = (Bucket(1, 32, 32), Bucket(1, 128, 128), Bucket(1, 512, 512), Bucket(8, 128, 256), Bucket(32, 128, 1024))


class CardSession:
    """What the sessions on a card have in common: two batches are under way, and more texts tokenised meanwhile."""

    threads = 2  # while one waits for Python, the card works for the other
    window: int | None = 2048

    def side_by_side(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to prepare: the card shares itself out."""
        return contextlib.nullcontext()

    def abandon(self) -> None:
        """Refuse: a forked child cannot use its parent's card.

        Raises:
            StartError: Always.
        """
        raise StartError("CUDA does not survive a fork; start child processes with 'spawn' or 'forkserver'")


class CudaSession(CardSession):
    """One graph opened on a card. Safe to call from several threads at once.

    Args:
        model: The ONNX file's bytes.
        model_facts: The model's sizes, which say what a token takes of the card's memory.
        device_id: Which card.
        memory_bytes: The card's memory.
        feed: Lays token ids out as the graph wants them.
        cuda_graphs: Capture the runs of small batches, whose time is otherwise the CPU's; the graph must be packed.

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
        self._feed, self._device_id, self._dim = feed, device_id, model_facts.embedding_dim
        self.max_batch_tokens = batch_tokens(model_facts, memory_bytes)
        self._session = self._open(model, cuda_graphs)
        self._eager = import_onnxruntime().RunOptions()
        self._eager.add_run_config_entry("gpu_graph_id", "-1")
        cudart = cuda_runtime()
        # Four arrays of int32, or two of int64, over at most every cell of the rectangle; and the vectors.
        self._most_rows = max(1, self.max_batch_tokens // 8)
        size = 16 * self.max_batch_tokens + 4 * self._dim * self._most_rows + (1 << 16)
        self._buffers: queue.SimpleQueue[PinnedBuffer] = queue.SimpleQueue()
        for _ in range(self.threads + 1):
            self._buffers.put(PinnedBuffer(size, cudart))
        self._captured: dict[Bucket, _Captured] = {}
        if cuda_graphs:
            # A capture belongs to the thread that made it.
            self._capturer = ThreadPoolExecutor(1, thread_name_prefix="m3e-cuda-graph")
            try:
                self._capturer.submit(self._capture_all, model_facts.max_seq_length).result()
            except Exception as error:  # onnxruntime's exceptions share no base class
                self._captured = {}
                self._session = self._open(model, False)
                warnings.warn(f"CUDA graphs are off, small batches take longer: {error}", RuntimeWarning, stacklevel=2)

    def _open(self, model: bytes, cuda_graphs: bool) -> Any:
        options = cuda_options(self._device_id, cuda_graphs=cuda_graphs)
        return open_on_gpu(model, CUDA, [(CUDA, options), ("CPUExecutionProvider", {})])

    def _capture_all(self, max_seq_length: int) -> None:
        for number, bucket in enumerate(BUCKETS):
            if bucket.width <= max(max_seq_length, BUCKETS[0].width):
                captured = _Captured(self._session, bucket, number, self._device_id, self._dim)
                captured.run([[0]])
                self._captured[bucket] = captured

    def plan(
        self, n_tokens: npt.NDArray[np.int64], max_batch_size: int | None = None
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
            for bucket, captured in self._captured.items():
                if bucket.fits(input_ids):
                    return check_finite(self._capturer.submit(captured.run, input_ids).result())
            feeds = self._feed(input_ids)
            if prompt_length:
                feeds["prompt_length"] = np.array([prompt_length], dtype=np.int64)
            return check_finite(self._run_eagerly(feeds, len(input_ids)))
        except InferenceError:
            raise
        except Exception as error:
            raise InferenceError(f"onnxruntime failed on a batch of {len(input_ids)} texts: {error}") from error

    def _run_eagerly(self, feeds: Feeds, rows: int) -> Float32Array:
        """Copy from and to page-locked memory; as many calls at a time as there are buffers."""
        shapes = [*((array.shape, array.dtype) for array in feeds.values()), ((rows, self._dim), np.dtype(np.float32))]
        with self._buffer(size_of(shapes)) as buffer:
            *staged, out = buffer.views(shapes)
            binding = self._session.io_binding()
            for (name, array), view in zip(feeds.items(), staged, strict=True):
                view[...] = array
                binding.bind_input(name, "cpu", 0, view.dtype.type, view.shape, view.ctypes.data)
            binding.bind_output(OUTPUT, "cpu", 0, np.float32, out.shape, out.ctypes.data)
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding, self._eager)
            binding.synchronize_outputs()
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


class _Captured:
    """One bucket's inputs and output on the card, where the captured run finds them each time."""

    def __init__(self, session: Any, bucket: Bucket, number: int, device_id: int, dim: int) -> None:
        onnxruntime = import_onnxruntime()
        self._session, self._bucket = session, bucket
        feeds = bucket.feeds([[0]])
        self._inputs = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", device_id) for name, array in feeds.items()
        }
        shape = (len(feeds["token_offset"]), dim)
        self._output = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", device_id)
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(OUTPUT, self._output)
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))

    def run(self, input_ids: Sequence[Sequence[int]]) -> Float32Array:
        """Put the texts in place, run, and take their vectors; the first time captures."""
        for name, array in self._bucket.feeds(input_ids).items():
            self._inputs[name].update_inplace(array)
        self._session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        vectors: Float32Array = self._output.numpy()[: len(input_ids)]
        return vectors


def batch_tokens(model: Model, memory_bytes: int) -> int:
    """How many tokens a batch may have on a card: what the activations of a token take, into a share of its memory."""
    # Alive at once in a layer: input, Q, K, V, context and sums, and the inner activation twice, FP16; pooling's FP32.
    token_bytes = 2 * (8 * model.hidden_size + 2 * model.intermediate_size) + 3 * 4 * model.hidden_size
    fitting = int(_MEMORY_SHARE * memory_bytes) // token_bytes
    return max(model.max_seq_length, min(_MOST_TOKENS, fitting))
