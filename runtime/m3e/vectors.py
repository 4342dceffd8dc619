"""What can be done to embeddings once they exist: shorten, normalise, quantise, compare."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from m3e.errors import InputError

Float32Array = npt.NDArray[np.float32]
EmbeddingPrecision = Literal["float32", "int8", "uint8", "binary", "ubinary"]


def normalize(embeddings: Float32Array) -> Float32Array:
    """Scale rows to unit length; a zero row stays zero.

    The lower bound on the norm is torch.nn.functional.normalize's.

    Args:
        embeddings: float32 (n, dim).

    Returns:
        float32 (n, dim), a new array.
    """
    # Row by row: numpy's reduction over an array adds in an order that depends on how many rows there are.
    squares = np.array([row @ row for row in embeddings], dtype=np.float32)
    norms = np.maximum(np.sqrt(squares), np.float32(1e-12))
    return np.divide(embeddings, norms[:, np.newaxis], dtype=np.float32)


def quantize_embeddings(
    embeddings: Float32Array, precision: EmbeddingPrecision, ranges: Float32Array | None = None
) -> npt.NDArray[Any]:
    """Store embeddings in fewer bits, with the formulas of sentence-transformers' ``quantize_embeddings``.

    The ranges are fixed by the caller, so a text gets the same bytes in every call. Values outside them are clipped
    (older sentence-transformers let them wrap around).

    Args:
        embeddings: float32 (n, dim).
        precision: ``float32`` as it is; ``int8``, ``uint8`` 256 steps over the range of each dimension; ``binary``
            (int8) and ``ubinary`` (uint8) the signs, packed eight to a byte.
        ranges: float32 (2, dim), minimum and maximum of each dimension; needed for int8 and uint8.

    Returns:
        (n, dim), or (n, ceil(dim / 8)) for the binary ones.

    Raises:
        InputError: Unknown precision, or ranges missing or of another shape.
    """
    if precision == "float32":
        return embeddings
    if precision in ("binary", "ubinary"):
        packed = np.packbits(embeddings > 0, axis=1)
        # Through int16, because 0 - 128 leaves uint8's range.
        return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    if precision not in ("int8", "uint8"):
        raise InputError(f"unknown precision {precision!r}, expected one of {', '.join(get_args(EmbeddingPrecision))}")
    if ranges is None or ranges.shape != (2, embeddings.shape[1]):
        got = "none" if ranges is None else f"shape {ranges.shape}"
        raise InputError(f"{precision} needs ranges of shape (2, {embeddings.shape[1]}), received {got}")
    steps = (ranges[1] - ranges[0]) / 255
    steps = np.where(steps == 0, np.float32(1), steps)  # a dimension that never changes
    levels: Float32Array = np.clip(np.floor((embeddings - ranges[0]) / steps), 0, 255)
    if precision == "uint8":
        return levels.astype(np.uint8)
    return (levels - 128).astype(np.int8)


def similarity(a: npt.ArrayLike, b: npt.ArrayLike, similarity_fn_name: str = "cosine") -> Float32Array:
    """Compare every row of a with every row of b.

    Args:
        a: (n, dim) or (dim,).
        b: (m, dim) or (dim,).
        similarity_fn_name: ``cosine``, ``dot``, ``euclidean`` or ``manhattan``; the last two negated, so that
            more is more alike.

    Returns:
        float32 (n, m).

    Raises:
        InputError: Other shapes, or an unknown name.
    """
    left, right = _rows(a), _rows(b)
    if left.shape[1] != right.shape[1]:
        raise InputError(f"cannot compare vectors of {left.shape[1]} and {right.shape[1]} dimensions")
    if similarity_fn_name == "cosine":
        cosines: Float32Array = normalize(left) @ normalize(right).T
        return cosines
    if similarity_fn_name == "dot":
        return left @ right.T
    if similarity_fn_name == "euclidean":
        distances = [np.linalg.norm(right - row, axis=1) for row in left]
    elif similarity_fn_name == "manhattan":
        distances = [np.abs(right - row).sum(axis=1) for row in left]
    else:
        raise InputError(f"unknown similarity {similarity_fn_name!r}, expected cosine, dot, euclidean or manhattan")
    return -np.array(distances, dtype=np.float32).reshape(len(left), len(right))


def _rows(vectors: npt.ArrayLike) -> Float32Array:
    rows = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    if rows.ndim != 2:
        raise InputError(f"expected vectors of shape (n, dim) or (dim,), received shape {rows.shape}")
    return rows
