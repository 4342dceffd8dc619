"""Requests that wait: which texts run next, and together. Plain data, no threads; `m3e.scheduler` holds the lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from m3e.errors import DeadlineError, M3EError
from m3e.plan import CELLS_PER_TOKEN, SPREAD, attention_width

Float32Array = npt.NDArray[np.float32]
Priority = Literal["interactive", "bulk"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)

# While both lanes wait, every fourth batch starts with the oldest bulk text, so that bulk never starves.
_INTERACTIVE_BATCHES_IN_A_ROW = 3


class Job:
    """One request: token ids in, vectors or an error out.

    Attributes:
        vectors: float32 (n, dim); complete once ``done`` is true and ``error`` is None.
        n_waiting_tokens: Tokens of its texts that no batch has taken.
        started_at: When its first batch began, on the clock of `time.monotonic`; 0.0 before.
    """

    __slots__ = (
        "deadline", "done", "enqueued_at", "error", "finished_at", "input_ids", "n_left", "n_tokens",
        "n_waiting_tokens", "on_done", "priority", "started_at", "vectors",
    )  # fmt: skip

    def __init__(
        self,
        input_ids: Sequence[list[int]],
        dim: int,
        *,
        priority: Priority,
        deadline: float,
        on_done: Callable[[Job], None],
        now: float,
    ) -> None:
        self.input_ids = input_ids
        self.vectors: Float32Array = np.empty((len(input_ids), dim), dtype=np.float32)
        self.n_tokens = sum(map(len, input_ids))
        self.n_waiting_tokens = 0
        self.n_left = len(input_ids)
        self.priority: Priority = priority
        self.deadline = deadline
        self.on_done = on_done
        self.enqueued_at = now
        self.started_at = 0.0
        self.finished_at = 0.0
        self.error: M3EError | None = None
        self.done = False


class Item:
    """One text of a job."""

    __slots__ = ("job", "row", "taken", "width")

    def __init__(self, job: Job, row: int, width: int) -> None:
        self.job = job
        self.row = row
        self.width = width
        self.taken = False

    @property
    def ids(self) -> list[int]:
        """The text's token ids."""
        return self.job.input_ids[self.row]


class _Lane:
    """Texts of one priority, in order of arrival and again by width. Taken and abandoned ones are skipped lazily."""

    def __init__(self) -> None:
        self.arrivals: deque[Item] = deque()
        self.by_width: dict[int, deque[Item]] = {}

    def add(self, item: Item) -> None:
        self.arrivals.append(item)
        self.by_width.setdefault(item.width, deque()).append(item)

    def oldest(self) -> Item | None:
        return _live_head(self.arrivals)

    def companions(self, width: int, n: int, expire: Callable[[Job], bool]) -> list[Item]:
        """Take up to n texts of a width, oldest first, of jobs that have not expired."""
        waiting = self.by_width.get(width)
        taken: list[Item] = []
        while waiting and len(taken) < n and (item := _live_head(waiting)) is not None:
            if expire(item.job):
                continue
            waiting.popleft()
            item.taken = True
            taken.append(item)
        if not waiting:
            self.by_width.pop(width, None)
        return taken


class TokenQueue:
    """Waiting jobs, bounded by nobody here but counted in tokens.

    Args:
        max_batch_tokens: Bound on a batch, each text widened to its width; its rectangle has at most twice as many
            cells. A single longer text still gets a batch.
        mixed: Whether texts of several widths may share a batch.

    Attributes:
        n_tokens: Tokens that wait.
        n_jobs: Requests of which at least one text waits.
    """

    def __init__(self, max_batch_tokens: int, *, mixed: bool = False) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._mixed = mixed
        self._lanes: dict[str, _Lane] = {priority: _Lane() for priority in PRIORITIES}
        self._interactive_in_a_row = 0
        self.n_tokens = 0
        self.n_jobs = 0

    def add(self, job: Job) -> None:
        """Let a job's texts wait."""
        lane = self._lanes[job.priority]
        for row, ids in enumerate(job.input_ids):
            lane.add(Item(job, row, attention_width(len(ids), mixed=self._mixed)))
        job.n_waiting_tokens = job.n_tokens
        self.n_tokens += job.n_tokens
        self.n_jobs += 1

    def drop(self, job: Job) -> None:
        """Forget the texts of a job that is done; batches that already took some go on."""
        if job.n_waiting_tokens:
            self.n_tokens -= job.n_waiting_tokens
            self.n_jobs -= 1
            job.n_waiting_tokens = 0
        if self.n_tokens == 0:  # nothing live is left: let go of the dead at once
            for lane in self._lanes.values():
                lane.arrivals.clear()
                lane.by_width.clear()

    def take(self, now: float) -> tuple[list[Item], list[Job]]:
        """Take the next batch: the oldest text and others of its width or, where they may, close to it, of both lanes.

        Returns:
            The batch, empty if nothing waits; and jobs whose deadline had passed, now done with `DeadlineError`.
        """
        expired: list[Job] = []

        def expire(job: Job) -> bool:
            if job.deadline > now:
                return False
            job.error = DeadlineError("the request's time ran out while it waited; its texts were not run")
            job.done = True
            self.drop(job)
            expired.append(job)
            return True

        while (head := self._next()) is not None and expire(head.job):
            pass
        if head is None:
            return [], expired
        lane = self._lanes[head.job.priority]
        other = self._lanes["bulk" if head.job.priority == "interactive" else "interactive"]
        batch: list[Item] = []
        most, narrowest, widest = max(self._max_batch_tokens, head.width), head.width, head.width
        left = most
        for source in (lane, other):
            for width in self._widths(head.width):
                low, high = min(narrowest, width), max(widest, width)
                if high - low > SPREAD:
                    continue
                n_rows = CELLS_PER_TOKEN * most // high - len(batch)
                found = source.companions(width, min(left // width, n_rows), expire)
                if found:
                    batch += found
                    left, narrowest, widest = left - width * len(found), low, high
        for item in batch:
            job, length = item.job, len(item.ids)
            job.n_waiting_tokens -= length
            self.n_tokens -= length
            self.n_jobs -= job.n_waiting_tokens == 0
        return batch, expired

    def waiting_jobs(self) -> list[Job]:
        """Every job of which a text waits."""
        items = [item for lane in self._lanes.values() for item in lane.arrivals if not _dead(item)]
        return list(dict.fromkeys(item.job for item in items))

    def _widths(self, head: int) -> list[int]:
        """Widths that may join a text's, nearest first."""
        if not self._mixed:
            return [head]
        waiting = {width for lane in self._lanes.values() for width in lane.by_width}
        return sorted((w for w in waiting if abs(w - head) <= SPREAD), key=lambda w: (abs(w - head), w))

    def _next(self) -> Item | None:
        interactive, bulk = self._lanes["interactive"].oldest(), self._lanes["bulk"].oldest()
        if interactive is None or (bulk is not None and self._interactive_in_a_row >= _INTERACTIVE_BATCHES_IN_A_ROW):
            self._interactive_in_a_row = 0
            return bulk
        self._interactive_in_a_row += bulk is not None
        return interactive


def _dead(item: Item) -> bool:
    return item.taken or item.job.done


def _live_head(waiting: deque[Any]) -> Item | None:
    while waiting and _dead(waiting[0]):
        waiting.popleft()
    return waiting[0] if waiting else None
