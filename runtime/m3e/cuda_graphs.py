"""Small batches on a card as captured CUDA graphs: launching the kernels one by one takes longer than they run."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3e.feeds import Feeds, pack
from m3e.providers import CUDA, cuda_options, open_on_gpu
from m3e.session import OUTPUT, Float32Array, import_onnxruntime


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


class CudaGraphs:
    """A packed graph captured for each bucket, in a session of its own. Safe to call from several threads at once.

    A replay writes to the addresses that its capture used, and to onnxruntime's arena they are free: whatever else runs
    in the same session at that moment would lose its values. So "Run() MAY NOT be invoked on the same InferenceSession
    object from multiple threads while using CUDA Graphs" (onnxruntime, CUDA Execution Provider), and larger batches
    have another session, with another arena.

    Args:
        model: The ONNX file's bytes.
        device_id: Which card.
        max_seq_length: The longest text; wider buckets are left out.
        dim: Length of a vector.

    Raises:
        Exception: Of any kind; a run cannot be captured here.
    """

    def __init__(self, model: bytes, *, device_id: int, max_seq_length: int, dim: int) -> None:
        self._session = open_on_gpu(model, CUDA, cuda_options(device_id, cuda_graphs=True))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="m3e-cuda-graph")
        self._captured: dict[Bucket, _Captured] = {}
        self._thread.submit(self._capture_all, device_id, max_seq_length, dim).result()

    def run(self, input_ids: Sequence[Sequence[int]]) -> Float32Array | None:
        """Run one batch: float32 (batch, dim), or None if no bucket takes it."""
        for bucket, captured in self._captured.items():
            if bucket.fits(input_ids):
                return self._thread.submit(captured.run, input_ids).result()
        return None

    def _capture_all(self, device_id: int, max_seq_length: int, dim: int) -> None:
        for number, bucket in enumerate(BUCKETS):
            if bucket.width <= max(max_seq_length, BUCKETS[0].width):
                captured = _Captured(self._session, bucket, number, device_id, dim)
                captured.run([[0]])
                self._captured[bucket] = captured


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
        vectors: Float32Array = self._output.numpy()[: len(input_ids)]
        return vectors
