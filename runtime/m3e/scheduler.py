"""Concurrent callers -> shared batches: admission, the threads that run them, failures kept to whoever caused them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from m3e.checks import check_integer
from m3e.errors import ClosedError, InferenceError, InputError, M3EError, OverloadedError, WorkerLostError
from m3e.plan import MAX_SHARED_BATCH_TOKENS
from m3e.token_queue import PRIORITIES, Item, Job, Priority, TokenQueue

Float32Array = npt.NDArray[np.float32]
Embed = Callable[[list[list[int]]], Float32Array]

# So many requests may wait whatever the predicted wait is: ordinary clients come in bursts.
_ALWAYS_ADMITTED = 64
# Weight of the newest batch in the estimate of tokens per second.
_RATE_WEIGHT = 0.1
_IDLE_CHECK_S = 0.25


class Scheduler:
    """A queue of jobs and the threads that run them. Every method may be called from any thread.

    An idle thread takes whatever waits at once; while all are busy, texts gather and share the next batch. A batch
    that fails is halved until the texts that fail are alone; their neighbours get their vectors.

    Args:
        embed: Token ids of texts -> float32 (n, dim). Called by one thread at a time for
            each function.
        dim: Length of a vector.
        max_batch_tokens: Bound on a batch, each text widened to its width.
        mixed: Whether texts of several widths may share a batch.
        max_queue_tokens: Bound on the tokens that wait; a single larger request is let into an empty queue.
        max_queue_ms: Bound on the predicted wait; the first 64 waiting requests are not held to it. None for none.
        deliver: Called by the thread that ran a batch with the jobs that it finished; None calls each job's own
            ``on_done``.
        observe: Called after each batch with its number of texts, of tokens, and its seconds.
        check_idle: Called about four times a second by a thread that has nothing to do.
    """

    def __init__(
        self,
        embed: Sequence[Embed],
        *,
        dim: int,
        max_batch_tokens: int = MAX_SHARED_BATCH_TOKENS,
        mixed: bool = False,
        max_queue_tokens: int = 262144,
        max_queue_ms: float | None = None,
        deliver: Callable[[list[Job]], None] | None = None,
        observe: Callable[[int, int, float], None] | None = None,
        check_idle: Callable[[], None] | None = None,
    ) -> None:
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_queue_tokens", max_queue_tokens)):
            check_integer(name, value)
        self._dim = dim
        self._max_queue_tokens = max_queue_tokens
        self._max_queue_ms = max_queue_ms
        self._deliver = deliver or _call_each
        self._observe = observe
        self._check_idle = check_idle
        self._queue = TokenQueue(max_batch_tokens, mixed=mixed)
        self._changed = threading.Condition()
        self._turn = _Turn()
        self._tokens_per_s = 0.0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(function,), name=f"m3e-batch-{i}", daemon=True)
            for i, function in enumerate(embed)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def n_waiting_tokens(self) -> int:
        """Tokens in the queue."""
        return self._queue.n_tokens

    @property
    def n_waiting_jobs(self) -> int:
        """Requests in the queue."""
        return self._queue.n_jobs

    def predicted_wait_s(self) -> float:
        """Seconds that a request arriving now would wait, from the rate of the last batches."""
        rate = self._tokens_per_s * len(self._threads)
        return self._queue.n_tokens / rate if rate else 0.0

    def overload(self) -> OverloadedError | None:
        """What any request would be refused with now, whatever its size; None if it might be let in."""
        wait_s = self.predicted_wait_s()
        slow = (
            self._max_queue_ms is not None
            and wait_s * 1000 > self._max_queue_ms
            and self._queue.n_jobs >= _ALWAYS_ADMITTED
        )
        return self._refusal(wait_s) if slow else None

    def submit(
        self,
        input_ids: Sequence[list[int]],
        on_done: Callable[[Job], None],
        *,
        priority: Priority = "interactive",
        timeout_s: float | None = None,
    ) -> Job:
        """Queue the texts of one request, all or none.

        Raises:
            OverloadedError: The queue is full.
            ClosedError: `close` was called.
            InputError: Another priority.
        """
        if priority not in PRIORITIES:
            raise InputError(f"priority is {priority!r}, expected one of {', '.join(PRIORITIES)}")
        now = time.monotonic()
        deadline = now + timeout_s if timeout_s is not None else float("inf")
        job = Job(input_ids, self._dim, priority=priority, deadline=deadline, on_done=on_done, now=now)
        with self._changed:
            self._admit(job)
            self._queue.add(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Forget a job: what no batch has taken will not run, and nobody is told."""
        with self._changed:
            job.done = True
            self._queue.drop(job)

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more jobs, finish those that wait or fail them with `ClosedError`, and end the threads.

        Args:
            drain: Whether waiting jobs still run.
            timeout_s: Give up waiting for the threads after this; a thread that hangs is left behind.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if drain:
            self._join(until)
        with self._changed:
            left = self._queue.waiting_jobs()
            for job in left:
                self._end(job, ClosedError("the service closed before the request was run"))
        self._deliver(left)
        self._join(until)

    def _join(self, until: float | None) -> None:
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(None if until is None else max(0.0, until - time.monotonic()))

    def _admit(self, job: Job) -> None:
        if self._closed:
            raise ClosedError("the service is closed and takes no more requests")
        refusal = self.overload()
        if refusal is None and 0 < self._queue.n_tokens > self._max_queue_tokens - job.n_tokens:
            refusal = self._refusal(self.predicted_wait_s())
        if refusal is not None:
            raise refusal

    def _refusal(self, wait_s: float) -> OverloadedError:
        queue = self._queue
        return OverloadedError(
            f"{queue.n_tokens} tokens of {queue.n_jobs} requests wait already, about {wait_s:.1f} s of work; "
            "send again later or slower",
            retry_after_s=max(wait_s, 0.05),
        )

    def _work(self, embed: Embed) -> None:
        while True:
            with self._changed:
                while not (self._queue.n_tokens or self._closed):
                    if not self._changed.wait(None if self._check_idle is None else _IDLE_CHECK_S):
                        break
                batch, expired = self._queue.take(time.monotonic())
                if not batch and not expired and self._closed:
                    return
                if self._queue.n_tokens:
                    self._changed.notify()  # one submit may hold work for several threads
            if expired:
                self._deliver(expired)
            if batch:
                self._run(embed, batch)
            elif not expired and self._check_idle is not None:
                self._check_idle()

    def _run(self, embed: Embed, batch: list[Item]) -> None:
        now = time.monotonic()
        for item in batch:
            item.job.started_at = item.job.started_at or now
        try:
            with self._turn.shared():
                vectors = self._embed(embed, batch)
        except WorkerLostError:
            # Whatever ran in that process may have killed it, so each suspect gets the process for itself.
            for item in batch:
                if not item.job.done:
                    with self._turn.alone():
                        self._try(embed, [item])
        except Exception as error:
            self._isolate(embed, batch, error)
        else:
            seconds = time.monotonic() - now
            n_tokens = sum(len(item.ids) for item in batch)
            rate = n_tokens / max(seconds, 1e-6)
            self._tokens_per_s += (rate - self._tokens_per_s) * (_RATE_WEIGHT if self._tokens_per_s else 1.0)
            if self._observe is not None:
                self._observe(len(batch), n_tokens, seconds)
            self._complete(batch, vectors)

    def _isolate(self, embed: Embed, batch: list[Item], error: Exception) -> None:
        """Halve a batch that failed, until the texts that fail are alone."""
        if len(batch) == 1:
            self._fail(batch[0], error)
            return
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            live = [item for item in half if not item.job.done]
            if live:
                with self._turn.shared():
                    failed = self._attempt(embed, live)
                if failed is not None:
                    self._isolate(embed, live, failed)

    def _try(self, embed: Embed, batch: list[Item]) -> None:
        failed = self._attempt(embed, batch)
        if failed is not None:
            self._fail(batch[0], failed)

    def _attempt(self, embed: Embed, batch: list[Item]) -> Exception | None:
        try:
            vectors = self._embed(embed, batch)
        except Exception as error:
            return error
        self._complete(batch, vectors)
        return None

    def _embed(self, embed: Embed, batch: list[Item]) -> Float32Array:
        vectors = embed([item.ids for item in batch])
        if vectors.shape != (len(batch), self._dim):
            raise InferenceError(f"the model gave vectors of shape {vectors.shape} for {len(batch)} texts")
        if not np.isfinite(vectors).all():
            raise InferenceError("the model gave values that are not finite")
        return vectors

    def _complete(self, batch: list[Item], vectors: Float32Array) -> None:
        finished: list[Job] = []
        with self._changed:
            for item, vector in zip(batch, vectors, strict=True):
                job = item.job
                if job.done:
                    continue
                job.vectors[item.row] = vector
                job.n_left -= 1
                if job.n_left == 0:
                    self._end(job, None)
                    finished.append(job)
        if finished:
            self._deliver(finished)

    def _fail(self, item: Item, error: Exception) -> None:
        with self._changed:
            if item.job.done:
                return
            known = error if isinstance(error, M3EError) else InferenceError(f"the model failed: {error}")
            self._end(item.job, known)
        self._deliver([item.job])

    def _end(self, job: Job, error: M3EError | None) -> None:
        job.error = error
        job.done = True
        job.finished_at = time.monotonic()
        self._queue.drop(job)


class _Turn:
    """Batches run side by side; a suspect runs alone."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._n_shared = 0
        self._alone = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._free:
            self._free.wait_for(lambda: not self._alone)
            self._n_shared += 1
        try:
            yield
        finally:
            with self._free:
                self._n_shared -= 1
                self._free.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._free:
            self._free.wait_for(lambda: not self._alone)
            self._alone = True
            self._free.wait_for(lambda: self._n_shared == 0)
        try:
            yield
        finally:
            with self._free:
                self._alone = False
                self._free.notify_all()


def _call_each(jobs: list[Job]) -> None:
    for job in jobs:
        job.on_done(job)
