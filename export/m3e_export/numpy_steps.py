"""The steps of `walk` in numpy, for the reference (float64) and for calibration (float32)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e_export.architectures import ACTIVATIONS
from m3e_export.checkpoint import Checkpoint, position_rows
from m3e_export.encoder_math import FARTHEST, FUNCTIONS, attention, bias_by_distance, layer_norm
from m3e_export.walk import PROJECTIONS

Array = npt.NDArray[Any]


class NumpySteps:
    """The steps of `walk` in numpy; values are (T, width).

    Args:
        checkpoint: The model.
        texts: Token ids of texts, sorted by length.
        dtype: Precision of every step.
    """

    def __init__(self, checkpoint: Checkpoint, texts: Sequence[Sequence[int]], dtype: npt.DTypeLike) -> None:
        self._checkpoint = checkpoint
        self._dtype = np.dtype(dtype)
        self._texts = [np.asarray(text) for text in texts]
        self._lengths = [len(text) for text in texts]
        table = checkpoint.tensors.get("encoder.relative_attention_bias.weight")
        self._bias = None if table is None else bias_by_distance(table.astype(self._dtype))

    def scope(self, name: str) -> None:
        """Nothing to name here."""

    def tensor(self, name: str) -> Array:
        """A tensor in the precision of the steps."""
        tensor: Array = self._checkpoint.tensors[name].astype(self._dtype, copy=False)
        return tensor

    def words(self) -> Array:
        """Word embeddings."""
        rows: Array = self._checkpoint.tensors["embeddings.word_embeddings.weight"][np.concatenate(self._texts)]
        return rows.astype(self._dtype, copy=False)

    def positions(self) -> Array:
        """What is added to the word embeddings."""
        pad = self._checkpoint.config.padding_position
        rows = position_rows(self._checkpoint, self._dtype)
        if pad is None:
            index = [np.arange(length) for length in self._lengths]
        else:  # pad tokens in a text have row 0 and are not counted
            index = [np.cumsum(text != pad) * (text != pad) for text in self._texts]
        found: Array = rows[np.concatenate(index)]
        return found

    def linears(self, site: str, names: Sequence[str], x: Array) -> list[Array]:
        """Linear layers of one input."""
        full = [f"{site}.{name}" for name in names]
        return [x @ self.tensor(f"{name}.weight").T + self.tensor(f"{name}.bias") for name in full]

    def layer_norm(self, name: str, x: Array) -> Array:
        """Layer normalisation."""
        epsilon = self._checkpoint.config.layer_norm_eps
        return layer_norm(x, self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"), epsilon)

    def add(self, a: Array, b: Array) -> Array:
        """Sum."""
        total: Array = a + b
        return total

    def attention(self, site: str, x: Array) -> Array:
        """Attention within each text."""
        return self.attend(*self.linears(site, PROJECTIONS, x))

    def attend(self, query: Array, key: Array, value: Array, *, rounded: bool = False) -> Array:
        """Attention within each text, its weights rounded or not; texts of one length run together."""
        context = np.empty_like(query)
        row = start = 0
        while start < len(self._lengths):
            length = self._lengths[start]
            stop = start + max(1, min(self._lengths[start:].count(length), 4096 // length))
            rows = slice(row, row + (stop - start) * length)
            q, k, v = (part[rows].reshape(stop - start, length, -1) for part in (query, key, value))
            bias = None
            if self._bias is not None:
                place = np.arange(length)
                bias = self._bias[:, np.clip(place[None] - place[:, None], -FARTHEST, FARTHEST) + FARTHEST]
            attended = attention(q, k, v, self._checkpoint.config.num_attention_heads, bias, rounded=rounded)
            context[rows] = attended.reshape(-1, context.shape[1])
            row, start = rows.stop, stop
        return context

    def activation(self, x: Array) -> Array:
        """The feed-forward block's activation."""
        return FUNCTIONS[ACTIVATIONS[self._checkpoint.config.hidden_act]](x)
