"""The graph's vectors -> what the caller asked for: shorter, of unit length, or quantised."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from m3e.checks import check_integer
from m3e.errors import InputError
from m3e.manifest import Manifest, decode_array
from m3e.vectors import EmbeddingPrecision, Float32Array, normalize, quantize_embeddings


def finish(
    embeddings: Float32Array,
    manifest: Manifest,
    *,
    precision: EmbeddingPrecision = "float32",
    normalize_embeddings: bool = False,
    truncate_dim: int | None = None,
) -> npt.NDArray[Any]:
    """Truncate, normalise and quantise vectors, in this order.

    Args:
        embeddings: float32 (n, dim), as the graph gives them.
        manifest: Of the bundle that they come from; it has the ranges for int8 and uint8.
        precision: What `m3e.vectors.quantize_embeddings` knows.
        normalize_embeddings: Scale them to unit length.
        truncate_dim: Keep the first dimensions only.

    Raises:
        InputError: ``truncate_dim`` is out of range, or there are no ranges for this combination.
    """
    dim = manifest.model.embedding_dim
    if truncate_dim is not None:
        truncate_dim = check_integer("truncate_dim", truncate_dim, 1, dim)
        embeddings = embeddings[:, :truncate_dim]
    if normalize_embeddings:
        embeddings = normalize(embeddings)
    if precision == "float32":
        return embeddings
    ranges = None
    if precision in ("int8", "uint8"):
        if normalize_embeddings and truncate_dim not in (None, dim):
            raise InputError(
                f"the bundle has no ranges for {precision} vectors that are truncated and then normalised; "
                "leave one of the two out, or call m3e.quantize_embeddings with ranges of your own"
            )
        unit = normalize_embeddings or manifest.model.normalize
        text = manifest.unit_embedding_ranges if unit else manifest.embedding_ranges
        ranges = decode_array(text, (2, dim))[:, :truncate_dim]
    return quantize_embeddings(embeddings, precision, ranges)
