"""Hostile weights: the exporter refuses them, or the graph gives finite vectors or raises. Never NaN, never a crash."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from m3e import InferenceError, M3EError
from m3e.session import Float32Array, Session
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.graph import build_graph
from m3e_export.sources import fetch_checkpoint
from tests.trust import Figure, Outcome, counted
from tests.trust.models import tiny_checkpoint

_IDS = [[2, 100, 200, 3], [2, 0, 3], [2, *range(50, 150), 3]]
_VALUES = (np.nan, np.inf, -np.inf, 1e38, -3e38, 1e-45, -1e-40, 0.0, -0.0, 65504.0, 1e6)


def checkpoints(count: int) -> Iterator[tuple[str, Checkpoint]]:
    """Draw checkpoints of which a tensor, or one of its values, or all tensors have a hostile value."""
    original = load_checkpoint(fetch_checkpoint(str(tiny_checkpoint())))
    rng = np.random.default_rng(0)
    names = sorted(original.tensors)
    for i in counted(count):
        value = np.float32(_VALUES[i % len(_VALUES)])
        tensors = dict(original.tensors)
        chosen = names if rng.random() < 0.1 else [names[int(rng.integers(len(names)))]]
        for name in chosen:
            tensor = tensors[name].copy()
            if rng.random() < 0.5:
                tensor[...] = value
            else:
                tensor.flat[int(rng.integers(tensor.size)) if rng.random() < 0.5 else _used(tensor)] = value
            tensors[name] = tensor
        yield f"{value} in {chosen[0]}", dataclasses.replace(original, tensors=tensors)


def _used(tensor: Float32Array) -> int:
    """A place that the texts read: the row of [SEP]."""
    return min(3 * int(tensor.shape[-1]), int(tensor.size) - 1)


def examine(run: Callable[[bytes], Float32Array], checkpoint: Checkpoint) -> str:
    """Build and run; what is wrong, or nothing."""
    try:
        with np.errstate(all="ignore"):
            vectors = run(build_graph(checkpoint).SerializeToString())
    except M3EError:
        return ""
    except Exception as error:
        return f"raised {error!r:.200}"
    return "" if np.isfinite(vectors).all() else "gave values that are not finite"


def _run(model: bytes) -> Float32Array:
    return Session(model, num_threads=1).run(_IDS)


def _run_unchecked(model: bytes) -> Float32Array:
    """The mistake: what comes out goes on."""
    session = Session(model, num_threads=1)
    vectors: Float32Array = session._alone.run(["sentence_embedding"], session._feed(_IDS))[0]
    return vectors


def _raise_other(model: bytes) -> Float32Array:
    """The mistake: another library's error."""
    try:
        return _run(model)
    except InferenceError as error:
        raise RuntimeError(str(error)) from error


def measure_runtime(count: int) -> Outcome:
    """Graphs of hostile weights in the runtime."""
    wrong = [f"{name}: {problem}" for name, each in checkpoints(count) if (problem := examine(_run, each))]
    caught = {
        name: any(examine(run, each) for _, each in checkpoints(22))
        for name, run in (("unchecked vectors", _run_unchecked), ("an error of another library", _raise_other))
    }
    return Outcome(f"{len(wrong)} of {count:,}" + (f"; first: {wrong[0]}" if wrong else ""), not wrong, caught)


FIGURES = (
    Figure(
        "B9", "hostile weights (NaN, infinity, 1e38, denormals): neither finite vectors nor an error of ours", "0",
        measure_runtime, quick=66, long=1000, soak=20_000,
    ),
)  # fmt: skip
