"""Which graph serves on a device, and the session that runs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from m3e.bundle import Bundle
from m3e.cpu import cpu_features
from m3e.cuda_session import CudaSession
from m3e.engine_cache import EngineCache, EngineKey
from m3e.errors import BundleError, StartError
from m3e.feeds import pack, pad, rectangle
from m3e.gpu import Card, read_card
from m3e.manifest import Graph
from m3e.memory import runs_side_by_side
from m3e.overlap import Workers
from m3e.providers import tensorrt_version
from m3e.session import Float32Array, Session, import_onnxruntime
from m3e.tensorrt_session import TensorrtSession, max_tokens, profiles

DEVICES = ("cpu", "cuda", "tensorrt", "auto")
# For each device, the graphs that run there, the fastest first; the FP32 graph of the CPU runs on CUDA as well.
_PREFERRED = {
    "cpu": (("int8", "cpu"), ("fp32", "cpu")),
    "cuda": (("fp16", "cuda"), ("fp32", "cpu")),
    "tensorrt": (("fp16", "tensorrt"), ("int8", "tensorrt")),
}


class AnySession(Protocol):
    """What the encoder needs of a session.

    Attributes:
        device: ``cpu``, ``cuda`` or ``tensorrt``.
        threads: How many batches to run at once.
        workers: Threads to run them in.
        window: How many texts to tokenise while others run; None for all of them before any.
        max_batch_tokens: How large a batch is best at most: tokens, each text widened to its width.
        max_shared_batch_tokens: The same of a batch that several callers share and wait for.
        mixed: Whether texts of several widths may share a batch.
    """

    device: str
    threads: int
    workers: Workers
    window: int | None
    max_batch_tokens: int
    max_shared_batch_tokens: int
    mixed: bool

    def plan(
        self, n_tokens: npt.NDArray[np.int64], max_batch_size: int | None = None, at_once: int = 1
    ) -> Iterator[npt.NDArray[np.intp]]:
        """Group texts into batches for `run`, of which so many run at once."""

    def run(self, input_ids: list[list[int]], *, prompt_length: int = 0) -> Float32Array:
        """Run one batch, the first ``prompt_length`` tokens of each text not pooled: float32 (batch, dim)."""

    def side_by_side(self) -> AbstractContextManager[None]:
        """Tell that batches are about to run at once."""

    def abandon(self) -> None:
        """Leave the session to the parent process of a fork."""


class PrecisionWarning(UserWarning):
    """``precision="auto"`` took a slower graph than the bundle has, because this processor cannot compute that one."""


def choose_graph(bundle: Bundle, precision: str, device: str) -> Graph:
    """Find the graph for a device.

    Args:
        bundle: The bundle.
        precision: One by name, the name of a graph's file, or ``auto`` for the fastest that this machine computes
            right.
        device: ``cpu``, ``cuda`` or ``tensorrt``.

    Raises:
        BundleError: The bundle has none; the message says what would make one.

    Warns:
        PrecisionWarning: ``auto`` passed over a faster graph.
    """
    features = cpu_features()
    for own, target in _PREFERRED[device]:
        graphs = [graph for graph in bundle.manifest.graphs if (graph.precision, graph.target) == (own, target)]
        if not any(precision in ("auto", own, graph.file) for graph in graphs):
            continue
        if precision != "auto":
            return bundle.graph(precision, target, features)
        try:
            return bundle.graph(own, target, features)
        except BundleError as error:
            warnings.warn(f"using fp32: {error}", PrecisionWarning, stacklevel=5)
    if precision != "auto":
        return bundle.graph(precision, device, features)
    return bundle.graph(*(("fp32", "cpu") if device == "cpu" else _PREFERRED[device][0]))


def open_session(
    bundle: Bundle, graph: Graph, *, device: str, device_id: int, num_threads: int, max_memory_mb: int | None
) -> AnySession:
    """Open a graph on the CPU or with CUDA.

    Raises:
        InputError: The graph does not fit into ``max_memory_mb``.
        DependencyError: onnxruntime, or its CUDA provider, is not installed.
        StartError: The provider did not load, or refuses the graph.
    """
    data = bundle.read_graph(graph)
    if device == "cpu":
        beside = runs_side_by_side(len(data), bundle.manifest.model, num_threads, max_memory_mb)
        return Session(data, num_threads=num_threads, side_by_side=beside, mixed=sums_whole_numbers(graph))
    packed = "com.microsoft::PackedMultiHeadAttention" in graph.ops
    traced = graph.target == "cuda" and not packed
    return CudaSession(
        data,
        bundle.manifest.model,
        device_id=device_id,
        memory_bytes=read_card(device_id).memory_bytes,
        feed=pack if packed else rectangle if traced else pad,
        cuda_graphs=packed,
    )


def sums_whole_numbers(graph: Graph) -> bool:
    """Whether the graph's attention is in integers, whose sums are the same whatever the width."""
    others = {"Softmax", "com.microsoft::MultiHeadAttention"}
    return graph.batch_invariant and graph.precision == "int8" and not others.intersection(graph.ops)


class Engines:
    """The TensorRT engines of a graph on a card: found, or built.

    Args:
        bundle: The bundle.
        graph: One of its graphs for TensorRT.
        device_id: Which card.
        cache: Folder of the engine cache; None for the user's own.

    Raises:
        StartError: There is no card, TensorRT cannot be loaded, or the cache is not private.
    """

    def __init__(self, bundle: Bundle, graph: Graph, *, device_id: int, cache: Path | None) -> None:
        self._bundle, self._graph, self._device_id = bundle, graph, device_id
        self._card = read_card(device_id)
        self._cache = EngineCache(cache)
        self.key = engine_key(bundle, graph, self._card)

    def find(self) -> TensorrtSession | None:
        """Open the engines that were built before; None if there are none."""
        folder = self._cache.find(self.key)
        return None if folder is None else self._open(folder, lambda line: None)

    def build(self, progress: Callable[[str], None] = lambda line: None) -> TensorrtSession:
        """Build the engines, which takes minutes, and open them from where the next process will find them."""
        with self._cache.building(self.key) as folder:
            self._open(folder, progress)
        session = self.find()
        if session is None:
            raise StartError("the engines are gone right after they were built; does something clean their folder?")
        return session

    def _open(self, folder: Path, progress: Callable[[str], None]) -> TensorrtSession:
        return TensorrtSession(
            self._bundle.read_graph(self._graph),
            self._bundle.manifest.model,
            device_id=self._device_id,
            memory_bytes=self._card.memory_bytes,
            folder=folder,
            progress=progress,
        )


def engine_key(bundle: Bundle, graph: Graph, card: Card) -> EngineKey:
    """Say what the engines of a graph on a card depend on."""
    if graph.target != "tensorrt":
        raise BundleError(f"{graph.file} is for {graph.target}, engines are built of graphs for tensorrt")
    onnxruntime, model = import_onnxruntime(), bundle.manifest.model
    return EngineKey(
        graph_sha256=bundle.manifest.files[graph.file].sha256,
        card=card.name,
        compute_capability=card.compute_capability,
        tensorrt=tensorrt_version(),
        cuda=f"{getattr(onnxruntime, 'cuda_version', '')}, driver {card.driver_cuda}",
        onnxruntime=onnxruntime.__version__,
        profiles=tuple(map(str, profiles(max_tokens(model, card.memory_bytes), model.max_seq_length))),
    )
