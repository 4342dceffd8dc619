"""Token counts -> batches: which texts run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

# A batch on the CPU: activations of so many tokens stay in a core's own cache.
MAX_BATCH_TOKENS = 384
# Texts of up to so many tokens are widened to a multiple of _BUCKET; longer ones share a batch with their equals.
_BUCKET = 4
LONGEST_BUCKET = 64


def plan_batches(
    n_tokens: npt.NDArray[np.int64], max_batch_tokens: int, max_batch_size: int | None = None, at_once: int = 1
) -> Iterator[npt.NDArray[np.intp]]:
    """Group texts of one attention length into batches under a token budget, longest first.

    Longest first, because then the largest buffers are allocated once. The batches of one length are of equal size,
    give or take a text, and as few as the budget and ``at_once`` allow: a few texts keep all threads busy to the end.

    Args:
        n_tokens: Token count of each text, int64 (n,).
        max_batch_tokens: Upper bound on the padded size of a batch, rows x longest row. A single longer
            text still gets a batch of its own.
        max_batch_size: Upper bound on the rows of a batch; None for no other bound than the tokens.
        at_once: How many batches run at once: where one length needs several, it gets a multiple of this, if it has
            so many texts.

    Yields:
        Indices into ``n_tokens``, intp (batch,), each index exactly once over all batches.
    """
    lengths = attention_length(n_tokens)
    for length in np.unique(lengths)[::-1]:
        group = np.flatnonzero(lengths == length)
        rows = max(1, max_batch_tokens // int(length))
        if max_batch_size is not None:
            rows = min(rows, max_batch_size)
        n_batches = -(-len(group) // rows)
        if n_batches > 1:
            n_batches = min(-(-n_batches // at_once) * at_once, len(group))
        yield from np.array_split(group, n_batches)


def attention_length(n_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Give the width of the rectangle that attention sees for texts of these token counts.

    It depends on the text alone, and only texts of one width share a batch. So attention does the same arithmetic
    in the same order whoever the neighbours are; every other operation sees one token at a time. Short texts
    are widened a little, that enough of them meet; past 64 tokens a text fills a batch without company.

    Args:
        n_tokens: int64 (n,).

    Returns:
        int64 (n,), each at least its token count.
    """
    n_tokens = np.maximum(n_tokens, 1)
    return np.where(n_tokens <= LONGEST_BUCKET, -(-n_tokens // _BUCKET) * _BUCKET, n_tokens)


def attention_width(n_tokens: int) -> int:
    """Give `attention_length` of one text; an array costs a request more than its width is worth."""
    n_tokens = max(n_tokens, 1)
    return -(-n_tokens // _BUCKET) * _BUCKET if n_tokens <= LONGEST_BUCKET else n_tokens


def plan_sorted(
    n_tokens: npt.NDArray[np.int64],
    max_batch_tokens: int,
    max_batch_size: int | None = None,
    edges: Sequence[int] = (),
) -> Iterator[npt.NDArray[np.intp]]:
    """Group texts of similar length into batches under a token budget, longest first, for a GPU.

    Args:
        n_tokens: Token count of each text, int64 (n,).
        max_batch_tokens: Upper bound on rows x longest row of a batch. A single longer text still gets a batch.
        max_batch_size: Upper bound on the rows of a batch; None for no other bound than the tokens.
        edges: Lengths that no batch may straddle: texts up to an edge and texts beyond it stay apart. Rows are counted
            as if the longest reached the next edge, so that each range has one largest number of rows.

    Yields:
        Indices into ``n_tokens``, intp (batch,), each index exactly once over all batches.
    """
    order = np.argsort(-n_tokens, kind="stable")
    lengths = n_tokens[order]
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[start]))
        rows = max(1, max_batch_tokens // min((edge for edge in edges if edge >= longest), default=longest))
        if max_batch_size is not None:
            rows = min(rows, max_batch_size)
        edge = max((edge for edge in edges if edge < longest), default=-1)
        stop = min(start + rows, int(np.searchsorted(-lengths, -edge)))
        yield order[start:stop]
        start = stop
