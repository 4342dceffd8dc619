"""Token counts -> batches: which texts run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

# A batch on the CPU: activations of so many tokens stay in a core's own cache.
MAX_BATCH_TOKENS = 384
# One that several callers share: everyone waits for all of it, and a larger one embeds next to nothing more a second.
MAX_SHARED_BATCH_TOKENS = 256
# Where attention depends on the width that it sees, texts of up to so many tokens are widened to a multiple of
# _BUCKET; longer ones share a batch with their equals.
_BUCKET = 4
LONGEST_BUCKET = 64
# Where it does not, texts may share a batch whose widths differ by so many tokens. Only attention works on the pads.
SPREAD = 24
# Cells that the rectangle of a batch may have for each token of the bound.
CELLS_PER_TOKEN = 2
# Tokens from which on a batch is worth a thread of its own: fewer, and all threads together answer sooner.
_WORTH_A_THREAD = 48


def plan_batches(
    n_tokens: npt.NDArray[np.int64],
    max_batch_tokens: int,
    max_batch_size: int | None = None,
    at_once: int = 1,
    *,
    mixed: bool = False,
) -> Iterator[npt.NDArray[np.intp]]:
    """Group texts of similar width into batches under a token budget, widest first.

    Widest first, because then the largest buffers are allocated once. Texts that may share batches are spread over
    them evenly, over as few as the budget and ``at_once`` allow: a few texts keep all threads busy to the end.

    Args:
        n_tokens: Token count of each text, int64 (n,).
        max_batch_tokens: Upper bound on the tokens of a batch, each text widened to its own width; its rectangle has at
            most twice as many cells. A single longer text still gets a batch of its own.
        max_batch_size: Upper bound on the rows of a batch; None for no other bound than the tokens.
        at_once: How many batches run at once: their number is a multiple of it where there is work for so many, and
            where equal shares keep the bounds.
        mixed: Whether texts of several widths may share a batch.

    Yields:
        Indices into ``n_tokens``, intp (batch,), each index exactly once over all batches.
    """
    if len(n_tokens) == 1:  # needs no plan, and most calls of a service that is not busy are of one text
        yield np.zeros(1, dtype=np.intp)
        return
    widths = attention_length(n_tokens, mixed=mixed)
    order = np.argsort(-widths, kind="stable")
    widths = widths[order]
    start = 0
    while start < len(order):
        stop = int(np.searchsorted(-widths, (SPREAD if mixed else 0) - widths[start], side="right"))
        for batch in np.split(order[start:stop], _cuts(widths[start:stop], max_batch_tokens, max_batch_size, at_once)):
            if len(batch):
                yield from np.array_split(batch, -(-len(batch) // (max_batch_size or len(batch))))
        start = stop


def _cuts(
    widths: npt.NDArray[np.int64], max_tokens: int, max_size: int | None, at_once: int
) -> npt.NDArray[np.intp] | list[int]:
    """Cut texts, widest first, into equal shares of their tokens; into full batches where such a share is too large."""
    ends = np.cumsum(widths)
    full: list[int] = []
    stop = 0
    while True:
        start, tokens = stop, int(ends[stop - 1]) if stop else 0
        stop = min(int(np.searchsorted(ends, tokens + max_tokens, side="right")),
                   start + CELLS_PER_TOKEN * max_tokens // int(widths[start]))  # fmt: skip
        stop = max(stop, start + 1)
        if stop >= len(widths):
            break
        full.append(stop)
    n_batches = max(len(full) + 1, -(-len(widths) // max_size) if max_size else 1)
    if n_batches > 1 or ends[-1] >= _WORTH_A_THREAD * at_once:
        n_batches = -(-n_batches // at_once) * at_once
    # Each text goes to the share in which its middle lies, so a share may be empty.
    even: npt.NDArray[np.intp] = np.searchsorted(ends - widths // 2, np.arange(1, n_batches) * (ends[-1] / n_batches))
    n_texts = np.diff(even, prepend=0, append=len(widths))
    n_tokens = np.diff(ends[even - 1] * (even > 0), prepend=0, append=ends[-1])
    widest = widths[np.minimum(np.concatenate(([0], even)), len(widths) - 1)]
    fits = (n_tokens <= max_tokens) & (n_texts * widest <= CELLS_PER_TOKEN * max_tokens)
    return even if (fits | (n_texts <= 1)).all() else full


def attention_length(n_tokens: npt.NDArray[np.int64], *, mixed: bool = False) -> npt.NDArray[np.int64]:
    """Give the width of the rectangle that attention sees for texts of these token counts.

    In floating point it depends on the text alone, and only texts of one width share a batch. So attention does the
    same arithmetic in the same order whoever the neighbours are; every other operation sees one token at a time. Short
    texts are widened a little, that enough of them meet; past 64 tokens a text fills a batch without company.

    Attention on whole numbers gives the same to the last bit whatever the width. So does pooling where the width is a
    multiple of 4: with others, onnxruntime's product of a vector and a matrix was seen to differ in the last bit.

    Args:
        n_tokens: int64 (n,).
        mixed: Whether texts of several widths may share a batch.

    Returns:
        int64 (n,), each at least its token count.
    """
    n_tokens = np.maximum(n_tokens, 1)
    widened = -(-n_tokens // _BUCKET) * _BUCKET
    return widened if mixed else np.where(n_tokens <= LONGEST_BUCKET, widened, n_tokens)


def attention_width(n_tokens: int, *, mixed: bool = False) -> int:
    """Give `attention_length` of one text; an array costs a request more than its width is worth."""
    n_tokens = max(n_tokens, 1)
    return -(-n_tokens // _BUCKET) * _BUCKET if mixed or n_tokens <= LONGEST_BUCKET else n_tokens


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
