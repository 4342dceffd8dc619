"""Token counts -> batches: which texts run together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt


def plan_batches(
    n_tokens: npt.NDArray[np.int64], max_batch_tokens: int, max_batch_size: int | None = None
) -> Iterator[npt.NDArray[np.intp]]:
    """Group texts of similar length into batches under a token budget.

    The graph computes real tokens only, so a batch costs the sum of its token counts; sorting by length
    keeps the padded copy that attention works on small. Longest first: the largest buffers are allocated once.

    Args:
        n_tokens: Token count of each text, int64 (n,).
        max_batch_tokens: Upper bound on the padded size of a batch, rows x longest row. A single longer
            text still gets a batch of its own.
        max_batch_size: Upper bound on the rows of a batch; None for no other bound than the tokens.

    Yields:
        Indices into ``n_tokens``, intp (batch,), each index exactly once over all batches.
    """
    order = np.argsort(-n_tokens, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, max_batch_tokens // max(1, int(n_tokens[order[start]])))
        if max_batch_size is not None:
            rows = min(rows, max_batch_size)
        yield order[start : start + rows]
        start += rows
