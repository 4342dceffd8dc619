"""The graphs against float64, over fuzzed batches of token ids.

The reference of an FP32 graph is the checkpoint's forward pass in float64. That of an INT8 graph is what its own file
says, in float64: the same levels and scales, without float32's rounding. So its figure is the runtime's error, and not
the quantisation's, which the bundle's certificate bounds.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from m3e import Encoder
from m3e.bundle import Bundle
from m3e.feeds import Feeds, pad
from m3e.session import Session
from m3e.vectors import normalize
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.numpy_steps import NumpySteps
from m3e_export.pooling import embed_sentence
from m3e_export.sources import fetch_checkpoint
from m3e_export.walk import hidden_states
from tests.trust import Figure, Outcome, counted
from tests.trust.children import in_child
from tests.trust.models import tiny_bundle, tiny_checkpoint
from tests.trust.token_batches import draw

Array = npt.NDArray[Any]
Embed = Callable[[list[list[int]]], Array]
# Largest difference of a component of unit vectors, and lowest cosine.
FP32_BOUND, FP32_COSINE = 2e-6, 0.999999
# A sum that float32 rounds to the other side of a half moves a level by one: the canary's tolerance for INT8 graphs.
INT8_BOUND, INT8_COSINE = 5e-4, 0.999999


class PublishedInt8(NumpySteps):
    """What an INT8 graph's file says, in float64.

    Args:
        checkpoint: What stayed FP32, and the shape.
        texts: As `NumpySteps` takes them.
        constants: The file's initializers by name.
    """

    def __init__(self, checkpoint: Checkpoint, texts: Sequence[Sequence[int]], constants: Mapping[str, Array]) -> None:
        super().__init__(checkpoint, texts, np.float64)
        self._constants = constants
        self._ids = np.concatenate([np.asarray(text) for text in texts])

    def words(self) -> Array:
        levels, scales = (self._constants[f"embeddings.word_embeddings.{part}"] for part in ("levels", "scales"))
        rows: Array = levels[self._ids].astype(np.float64) * scales[self._ids].astype(np.float64)
        return rows

    def linears(self, site: str, names: Sequence[str], x: Array) -> list[Array]:
        if f"{site}.scale" not in self._constants:
            return super().linears(site, names, x)
        x = x * self._constants.get(f"{site}.smoothing", 1.0)
        scale, zero = (float(self._constants[f"{site}.{part}"]) for part in ("scale", "zero_point"))
        levels = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
        return [
            levels @ self._constants[f"{site}.{name}.weight"].astype(np.float64)
            * (scale * self._constants[f"{site}.{name}.weight_scale"].astype(np.float64))
            + self._constants[f"{site}.{name}.bias"]
            for name in names
        ]  # fmt: skip

    def attention(self, site: str, x: Array) -> Array:
        query, pairs = (
            np.clip(np.rint(part), -128, 127) for part in self.linears(site, ("query", "key_value"), x)
        )  # fmt: skip
        config = self._checkpoint.config
        key, value = np.split(pairs, 2, axis=1)
        query *= float(self._constants[f"{site}.score_scale"])
        query *= math.sqrt(config.hidden_size // config.num_attention_heads)  # which `attend` divides by
        return self.attend(query, key, value * float(self._constants[f"{site}.value_scale"]), rounded=True)


def embed_float64(
    checkpoint: Checkpoint, make: Callable[[list[list[int]]], NumpySteps], batch: list[list[int]]
) -> Array:
    """Embed a batch with the steps that ``make`` gives for it: float64 (n, dim), in order."""
    order = sorted(range(len(batch)), key=lambda row: len(batch[row]))
    texts = [batch[row] for row in order]
    steps = make(texts)
    words = steps.words()
    first, *_, last = hidden_states(steps, checkpoint.config, words)
    ends = list(itertools.accumulate(map(len, texts)))[:-1]
    vectors = [
        embed_sentence(checkpoint, *values)
        for values in zip(*(np.split(state, ends) for state in (words, first, last)), strict=True)
    ]
    return np.stack(vectors)[np.argsort(order)]


@functools.cache
def references() -> dict[str, Embed]:
    """The float64 embedding of each precision."""
    checkpoint = load_checkpoint(fetch_checkpoint(str(tiny_checkpoint())))
    file = Bundle(tiny_bundle()).graph("int8", "cpu").file
    graph = onnx.load(tiny_bundle() / file).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return {
        "fp32": lambda batch: embed_float64(checkpoint, lambda t: NumpySteps(checkpoint, t, np.float64), batch),
        "int8": lambda batch: embed_float64(checkpoint, lambda t: PublishedInt8(checkpoint, t, constants), batch),
    }


def compare(precision: str, embed: Embed, count: int, seed: int = 0) -> tuple[float, float]:
    """Embed drawn batches, and give the largest difference of unit vectors and the lowest cosine."""
    rng, reference = np.random.default_rng(seed), references()[precision]
    largest, lowest = 0.0, 1.0
    for _ in counted(count):
        batch = draw(rng, 21128)
        expected, actual = reference(batch), embed(batch).astype(np.float64)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        actual /= np.linalg.norm(actual, axis=1, keepdims=True)
        # A comparison with NaN is false: what is not finite must not pass as small.
        difference, cosine = np.abs(actual - expected).max(), (actual * expected).sum(axis=1).min()
        largest = max(largest, float(difference)) if np.isfinite(difference) else np.inf
        lowest = min(lowest, float(cosine)) if np.isfinite(cosine) else -1.0
    return largest, lowest


def bundle_session(precision: str, feed: Callable[..., Feeds] = pad) -> Session:
    """The graph of a precision, with another way to lay out its inputs."""
    bundle = Bundle(tiny_bundle())
    return Session(bundle.read(bundle.graph(precision, "cpu").file), num_threads=1, feed=feed)


def mask_from_ids(input_ids: Sequence[Sequence[int]], seq_len: int | None = None) -> Feeds:
    """The mistake: a [PAD] in a text is not seen."""
    inputs = pad(input_ids, seq_len)
    return {**inputs, "attention_mask": (inputs["input_ids"] != 0).astype(np.int64)}


def mask_of_ones(input_ids: Sequence[Sequence[int]], seq_len: int | None = None) -> Feeds:
    """The mistake: pads are seen."""
    inputs = pad(input_ids, seq_len)
    return {**inputs, "attention_mask": np.ones_like(inputs["attention_mask"])}


def measure(precision: str, bound: float, cosine: float, count: int) -> Outcome:
    """A graph through the runtime against its float64."""
    tiny_bundle()
    return in_child(_measure, precision, bound, cosine, count, timeout_s=100_000)


def _measure(precision: str, bound: float, cosine: float, count: int) -> Outcome:

    def passed(found: tuple[float, float]) -> bool:
        return bool(found[0] <= bound and found[1] >= cosine)

    embed = Encoder(tiny_bundle(), precision=precision, num_threads=1).embed
    found = compare(precision, embed, count)
    broken: dict[str, Embed] = {
        "mask from ids": bundle_session(precision, mask_from_ids).run,
        "mask of ones": bundle_session(precision, mask_of_ones).run,
        "rows swapped": lambda batch: embed(batch)[::-1],
        "one value in a thousand moved by 1 %": lambda batch: _nudged(embed(batch)),
        "NaN in the last row": lambda batch: _with_nan(embed(batch)),
    }
    caught = {name: not passed(compare(precision, stand_in, 20)) for name, stand_in in broken.items()}
    return Outcome(f"{found[0]:.1e}, cosine {found[1]:.8f}, over {count:,} batches", passed(found), caught)


def _nudged(vectors: Array) -> Array:
    vectors = normalize(vectors)
    vectors.flat[::1000] += 0.01
    return vectors


def _with_nan(vectors: Array) -> Array:
    vectors[-1, 0] = np.nan
    return vectors


FIGURES = (
    Figure(
        "B5", "FP32 against float64: largest difference of unit vectors, lowest cosine", "<= 2e-6, >= 0.999999",
        functools.partial(measure, "fp32", FP32_BOUND, FP32_COSINE), quick=200, long=1000, soak=50_000,
    ),
    Figure(
        "B5b", "INT8 against its own levels in float64", f"<= {INT8_BOUND:.0e}, >= {INT8_COSINE}",
        functools.partial(measure, "int8", INT8_BOUND, INT8_COSINE), quick=100, long=1000, soak=50_000,
    ),
)  # fmt: skip
