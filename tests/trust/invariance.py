"""A text's vector does not depend on its neighbours, their order, the padding, or the number of threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e import Encoder
from m3e.session import Session
from m3e.vectors import normalize
from tests.trust import Figure, Outcome, counted
from tests.trust.models import tiny_bundle
from tests.trust.numbers import bundle_session, mask_of_ones
from tests.trust.token_batches import draw

Array = npt.NDArray[Any]
Embed = Callable[[list[list[int]]], Array]
BOUND = 1e-6
_THREADS = (1, 2, 4)
_REPEATS_A_BATCH = 10


def compositions(embed: Embed, count: int, seed: int = 0) -> float:
    """Embed texts alone and in shuffled batches; the largest difference of unit vectors."""
    rng, largest = np.random.default_rng(seed), 0.0
    for _ in counted(count):
        batch = draw(rng, 21128)
        order = rng.permutation(len(batch))
        together = normalize(embed([batch[i] for i in order]))
        alone = normalize(np.concatenate([embed([batch[i]]) for i in order]))
        largest = _larger(largest, together, alone)
    return largest


def paddings(session: Session, count: int, seed: int = 0) -> float:
    """Run batches in rectangles of several widths; the largest difference of unit vectors."""
    rng, largest = np.random.default_rng(seed), 0.0
    for _ in counted(count):
        batch = draw(rng, 21128, longest=256)
        width = max(map(len, batch))
        narrow = normalize(session.run(batch, width))
        for wider in (width + 1, width + int(rng.integers(2, 256))):
            largest = _larger(largest, normalize(session.run(batch, wider)), narrow)
    return largest


def _larger(largest: float, a: Array, b: Array) -> float:
    difference = float(np.abs(a - b).max())
    return max(largest, difference) if np.isfinite(difference) else np.inf


def measure_compositions(precision: str, count: int) -> Outcome:
    """Batches of any composition, and paddings of any width."""
    encoders = [Encoder(tiny_bundle(), precision=precision, num_threads=n) for n in _THREADS]
    embed = encoders[0].embed
    found = compositions(embed, count)
    padded = paddings(bundle_session(precision), count)
    threads = max(compositions(lambda batch: _either(encoders, batch), count // 4, seed=n) for n in (1, 2))
    broken: dict[str, Embed] = {
        "a neighbour's share": lambda batch: embed(batch) + 1e-4 * embed(batch).mean(axis=0),
        "a scale over the batch, as dynamic INT8 has it": lambda batch: _dynamic(embed(batch)),
        "rows swapped": lambda batch: embed(batch)[::-1],
    }
    caught = {name: compositions(stand_in, 30) > BOUND for name, stand_in in broken.items()}
    caught["mask of ones"] = paddings(bundle_session(precision, mask_of_ones), 10) > BOUND
    passed = max(found, padded, threads) <= BOUND
    return Outcome(
        f"neighbours and order {found:.1e}, padding {padded:.1e}, 1 to 4 threads {threads:.1e}, over {count:,} batches",
        passed,
        caught,
    )


def _either(encoders: list[Encoder], batch: list[list[int]]) -> Array:
    """Alone with one number of threads, together with another."""
    return encoders[len(batch) % len(encoders)].embed(batch)


def _dynamic(vectors: Array) -> Array:
    scale = np.abs(vectors).max() / 127
    rounded: Array = np.rint(vectors / scale) * scale
    return rounded


def measure_repeats(count: int) -> Outcome:
    """The same batch again and again, in each number of threads: distinct byte patterns."""
    batches = [draw(np.random.default_rng(seed), 21128) for seed in range(-(-count // _REPEATS_A_BATCH))]
    most = 0
    for n in _THREADS:
        embed = Encoder(tiny_bundle(), num_threads=n).embed
        most = max(most, *(_patterns(embed, batch) for batch in batches))
    noise = np.random.default_rng(0)

    def noisy(batch: list[list[int]]) -> Array:
        vectors = embed(batch)
        vectors.flat[0] = np.nextafter(vectors.flat[0], np.float32(noise.integers(-1, 2)))
        return vectors

    caught = {"the last bit of one value at random": _patterns(noisy, batches[0]) > 1}
    return Outcome(f"{most} in {count:,} repeats each with 1, 2 and 4 threads", most == 1, caught)


def _patterns(embed: Embed, batch: list[list[int]]) -> int:
    return len({embed(batch).tobytes() for _ in range(_REPEATS_A_BATCH)})


FIGURES = (
    Figure(
        "B1", "distinct byte patterns of one batch repeated", "1", measure_repeats, quick=20, long=1000, soak=100_000
    ),
    Figure(
        "B2", "FP32: difference by neighbours, order, padding, threads", "<= 1e-6",
        functools.partial(measure_compositions, "fp32"), quick=100, long=1000, soak=100_000,
    ),
    Figure(
        "B3", "INT8: difference by neighbours, order, padding, threads", "<= 1e-6",
        functools.partial(measure_compositions, "int8"), quick=100, long=1000, soak=100_000,
    ),
)  # fmt: skip
