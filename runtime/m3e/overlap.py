"""Work ahead: the next results are made while the caller uses this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from m3e.errors import InferenceError

# With 1 instead of 4, a thread often waits for the results before its own.
_AHEAD = 4

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """Threads that start with the first work and stay for the next: starting them costs a small batch its advantage.

    Args:
        threads: How many items are worked on at once, of all callers together.
    """

    def __init__(self, threads: int) -> None:
        self._pool, self._most_ahead = ThreadPoolExecutor(threads, "m3e"), _AHEAD * threads

    def ahead(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Apply a function to items and yield the results in order.

        At most four times as many items as there are threads, and one, are taken before their results are asked for:
        while one takes long, the other threads go on. When the caller stops early, or the function raises, what has
        begun is waited for and the rest is never begun.

        Args:
            function: What to apply; it should spend its time outside Python's interpreter lock.
            items: Taken one by one, in the caller's thread.

        Raises:
            InferenceError: The system starts no more threads.
        """
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                try:
                    pending.append(self._pool.submit(function, item))
                except RuntimeError as error:
                    raise InferenceError(
                        f"no thread could be started ({error}); allow this process more memory or threads, or take "
                        "num_threads=1"
                    ) from error
                if len(pending) > self._most_ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            wait([future for future in pending if not future.cancel()])
