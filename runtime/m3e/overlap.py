"""Work ahead: the next results are made while the caller uses this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from m3e.errors import InferenceError

# With 1 instead of 4, a thread often waits for the results before its own.
_AHEAD = 4

T = TypeVar("T")
R = TypeVar("R")


def ahead(function: Callable[[T], R], items: Iterable[T], threads: int = 1) -> Iterator[R]:
    """Apply a function in threads of its own and yield the results in order.

    At most four times ``threads`` + 1 items are taken before their results are asked for: while one takes long, the
    other threads go on. When the caller stops early, or the function raises, what has begun is waited for and the rest
    is never begun.

    Args:
        function: What to apply; it should spend its time outside Python's interpreter lock.
        items: Taken one by one, in the caller's thread.
        threads: How many items are worked on at once.

    Raises:
        InferenceError: The system starts no more threads.
    """
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                try:
                    pending.append(pool.submit(function, item))
                except RuntimeError as error:
                    raise InferenceError(
                        f"no thread could be started ({error}); allow this process more memory or threads, or take "
                        "num_threads=1"
                    ) from error
                if len(pending) > _AHEAD * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
