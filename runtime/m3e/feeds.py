"""Token ids of a batch -> the inputs of a graph, each graph's own layout."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Feeds = dict[str, npt.NDArray[Any]]


def pad(input_ids: Sequence[Sequence[int]], seq_len: int | None = None) -> Feeds:
    """Lay lists of ids out as rectangles, for the graphs of the CPU.

    Args:
        input_ids: Token ids of each text.
        seq_len: Width, at least the longest text's; None for just that.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 (batch, seq_len). Pads carry id 0, whatever the vocabulary calls
        it: the graph never looks at them.
    """
    seq_len = seq_len or max(map(len, input_ids))
    ids = np.zeros((len(input_ids), seq_len), dtype=np.int64)
    mask = np.zeros((len(input_ids), seq_len), dtype=np.int64)
    for row, row_ids in enumerate(input_ids):
        ids[row, : len(row_ids)] = row_ids
        mask[row, : len(row_ids)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def rectangle(input_ids: Sequence[Sequence[int]]) -> Feeds:
    """Lay lists of ids out as a rectangle with lengths, for TensorRT.

    Args:
        input_ids: Token ids of each text.

    Returns:
        ``input_ids``, int32 (batch, seq_len), as wide as the longest text, and ``lengths``, int32 (batch,).
    """
    lengths = _lengths(input_ids)
    ids = np.zeros((len(lengths), int(lengths.max())), dtype=np.int32)
    inside = np.arange(ids.shape[1], dtype=np.int32) < lengths[:, None]
    ids[inside] = _flat(input_ids, int(lengths.sum()))
    return {"input_ids": ids, "lengths": lengths}


def pack(input_ids: Sequence[Sequence[int]], seq_len: int | None = None) -> Feeds:
    """Lay lists of ids end to end, for CUDA.

    Args:
        input_ids: Token ids of each text.
        seq_len: Width of ``token_offset``, at least the longest text's; None for just that.

    Returns:
        ``input_ids`` and ``position_ids``, int32 (T,). ``token_offset``, int32 (batch, seq_len), the cells of the
        padded rectangle, those of real tokens before those of pads, each in their order. And
        ``cumulative_sequence_length``, int32 (batch + 1,). The latter two are what onnxruntime's
        PackedMultiHeadAttention defines.
    """
    lengths = _lengths(input_ids)
    ends = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=ends[1:])
    count = int(ends[-1])
    positions = np.arange(count, dtype=np.int32) - np.repeat(ends[:-1], lengths)
    seq_len = seq_len or int(lengths.max())
    inside = (np.arange(seq_len, dtype=np.int32) < lengths[:, None]).ravel()
    offsets = np.concatenate([np.flatnonzero(inside), np.flatnonzero(~inside)]).astype(np.int32)
    return {
        "input_ids": _flat(input_ids, count),
        "position_ids": positions,
        "token_offset": offsets.reshape(len(lengths), seq_len),
        "cumulative_sequence_length": ends,
    }


def _lengths(input_ids: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    return np.fromiter(map(len, input_ids), dtype=np.int32, count=len(input_ids))


def _flat(input_ids: Sequence[Sequence[int]], count: int) -> npt.NDArray[np.int32]:
    return np.fromiter(itertools.chain.from_iterable(input_ids), dtype=np.int32, count=count)
