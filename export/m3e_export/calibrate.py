"""FP32 weights + text -> INT8 weights and static activation scales, layer by layer.

Two streams of activations run side by side through the layers: the exact one, and the one that the quantised layers
before have made of the same texts. Each site (a quantised input and the linear layers that read it) is fitted so that
its outputs on the second stream come close to its outputs on the first. So a site also makes good what its
predecessors lost, and only one layer's activations are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from m3e_export.checkpoint import Checkpoint
from m3e_export.fit import Float32Array, Int8Site, centre, fit_attention, fit_site
from m3e_export.numpy_steps import NumpySteps
from m3e_export.pooling import embed_sentence
from m3e_export.walk import PROJECTIONS, hidden_states

Streams = tuple[Float32Array, Float32Array]  # exact and quantised, (T, width) each


def calibrate(
    checkpoint: Checkpoint,
    input_ids: Sequence[Sequence[int]],
    embeddings: Float32Array,
    *,
    kept: Sequence[str] = (),
    max_level: int = 127,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Int8Site], Float32Array]:
    """Quantise the linear layers of a checkpoint.

    Args:
        checkpoint: The model.
        input_ids: Token ids of the calibration texts.
        embeddings: Word embeddings (vocab, hidden) as the quantised graph will have them.
        kept: Sites that stay FP32, by the part of their name behind the layer, such as ``output``.
        max_level: Largest absolute weight level: 127, or 63 for processors whose 8-bit products saturate.
        progress: Called after each layer.

    Returns:
        Sites by name, such as ``encoder.layer.0.attention.self``; and the cosine of each text's vector, quantised
        against exact, float32 (n,).
    """
    texts = sorted(input_ids, key=len)  # equal lengths attend together
    steps = CalibrationSteps(checkpoint, texts, embeddings, kept, max_level)
    words = steps.words()
    states = hidden_states(steps, checkpoint.config, words)
    first = last = next(states)
    for state in states:
        last = state
        progress()
    ends = np.cumsum([len(ids) for ids in texts])[:-1]
    units = []
    for stream in zip(words, first, last, strict=True):
        by_text = zip(*(np.split(value, ends) for value in stream), strict=True)
        vectors = np.stack([embed_sentence(checkpoint, *values) for values in by_text])
        units.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return steps.sites, (units[0] * units[1]).sum(axis=1)


class CalibrationSteps:
    """The steps of `walk` on both streams; a linear layer is fitted when it is reached.

    Args:
        checkpoint: The model.
        texts: Token ids of texts, sorted by length.
        embeddings: Word embeddings (vocab, embedding_size) of the quantised stream.
        kept: Sites that stay FP32, by the part of their name behind the layer.
        max_level: Largest absolute weight level.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: Sequence[Sequence[int]],
        embeddings: Float32Array,
        kept: Sequence[str],
        max_level: int,
    ) -> None:
        self.sites: dict[str, Int8Site] = {}
        self._exact = NumpySteps(checkpoint, texts, np.float32)
        self._embeddings = embeddings
        self._ids = np.concatenate([np.asarray(text) for text in texts])
        self._kept = kept
        self._max_level = max_level

    def scope(self, name: str) -> None:
        """Nothing to name here."""

    def words(self) -> Streams:
        """Word embeddings, as they are and quantised."""
        return self._exact.words(), self._embeddings[self._ids]

    def positions(self) -> Streams:
        """What is added to the word embeddings; it is not quantised."""
        rows = self._exact.positions()
        return rows, rows

    def linears(self, site: str, names: Sequence[str], x: Streams) -> list[Streams]:
        """Fit a site's layers on the quantised stream, unless they are kept, and apply them."""
        targets = self._exact.linears(site, names, x[0])
        # ELECTRA's projection of the embeddings is a small share of the work, and all layers inherit its error.
        if not site.startswith("encoder.layer.") or site.split(".", 3)[3] in self._kept:
            return list(zip(targets, self._exact.linears(site, names, x[1]), strict=True))
        full = [f"{site}.{name}" for name in names]
        weights = [self._exact.tensor(f"{name}.weight").T for name in full]
        fitted = fit_site(full, weights, targets, x[1], self._max_level, self._divisor(site))
        self.sites[site] = fitted
        levels = fitted.quantize(x[1])
        return [(target, fitted.apply(name, levels)) for target, name in zip(targets, full, strict=True)]

    def layer_norm(self, name: str, x: Streams) -> Streams:
        """Layer normalisation."""
        return self._exact.layer_norm(name, x[0]), self._exact.layer_norm(name, x[1])

    def add(self, a: Streams, b: Streams) -> Streams:
        """Sum."""
        return a[0] + b[0], a[1] + b[1]

    def attention(self, site: str, x: Streams) -> Streams:
        """Attention within each text, on rounded values."""
        exact, (query, key, value) = zip(*self.linears(site, PROJECTIONS, x), strict=True)
        fitted, key = centre(self.sites[site], f"{site}.key", key)
        fitted, value = centre(fitted, f"{site}.value", value)
        steps = fit_attention(query, key, value)
        self.sites[site] = replace(fitted, attention=steps)
        return self._exact.attend(*exact), self._exact.attend(*steps.round(query, key, value), rounded=True)

    def _divisor(self, site: str) -> Float32Array | None:
        """What a site's input arrives divided by: that of attention's output layer in proportion to value's steps."""
        source = site.replace(".attention.output", ".attention.self")
        steps = None if source == site else self.sites[source].attention
        return None if steps is None else steps.value / np.exp(np.log(steps.value).mean())

    def activation(self, x: Streams) -> Streams:
        """The feed-forward block's activation."""
        return self._exact.activation(x[0]), self._exact.activation(x[1])
