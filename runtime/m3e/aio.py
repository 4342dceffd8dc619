"""One encoder in an asyncio program: concurrent tasks share batches."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from m3e.encoder import Encoder
from m3e.errors import ClosedError, DeadlineError
from m3e.scheduler import Scheduler
from m3e.token_queue import Job, Priority
from m3e.tokenizer import check_texts

Float32Array = npt.NDArray[np.float32]

# Fewer characters than this tokenise in less time than a thread takes to start on them.
INLINE_CHARACTERS = 1024
# Tasks that one turn of the loop wakes; each builds an answer, in about 0.2 ms.
_AT_ONCE = 8


class JobAwaiter:
    """Hands the jobs of a scheduler's threads to the tasks of one event loop, with one wake-up for each batch."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def deliver(self, jobs: list[Job]) -> None:
        """Give `Scheduler` this as ``deliver``."""
        try:
            self._loop.call_soon_threadsafe(self._wake, jobs)
        except RuntimeError:  # the loop was closed while a batch ran; nobody waits any more
            return

    def _wake(self, jobs: list[Job]) -> None:
        """Wake a few tasks at a time: between them the loop reads what has come."""
        for job in jobs[:_AT_ONCE]:
            job.on_done(job)
        if len(jobs) > _AT_ONCE:
            self._loop.call_soon(self._wake, jobs[_AT_ONCE:])

    async def run(
        self, scheduler: Scheduler, input_ids: Sequence[list[int]], *, priority: Priority, timeout_s: float | None
    ) -> Job:
        """Submit a job and wait for it. A task that is cancelled, or too late, takes its job along.

        Raises:
            OverloadedError: The queue is full.
            DeadlineError: ``timeout_s`` passed.
            ClosedError: The scheduler was closed.
            InferenceError: The model failed on one of the texts.
        """
        future: asyncio.Future[None] = self._loop.create_future()

        def wake(_: Job | None) -> None:
            if not future.done():
                future.set_result(None)

        job = scheduler.submit(input_ids, wake, priority=priority, timeout_s=timeout_s)
        timer = None if timeout_s is None else self._loop.call_later(timeout_s, wake, None)
        try:
            await future
        finally:
            if timer is not None:
                timer.cancel()
            if not job.done:
                scheduler.cancel(job)
                job.error = DeadlineError(f"no answer within {timeout_s} s")
        if job.error is not None:
            raise job.error
        return job


class AsyncEncoder:
    """Embeds for many tasks at once: ``async with AsyncEncoder(bundle) as encoder: await encoder.encode(text)``.

    A lone task waits for nobody. While as many batches run as the encoder has threads, texts gather, and those of
    similar length share the next. A cancelled task's texts are not run. Long texts are tokenised in a thread, so the
    loop stays free.

    Args:
        bundle: A bundle's folder, or an `Encoder` that is open.
        precision: As for `Encoder`.
        num_threads: As for `Encoder`.
        max_queue_tokens: Bound on the tokens that wait.
        max_queue_ms: Bound on the predicted wait; None for none.
    """

    def __init__(
        self,
        bundle: Encoder | str | os.PathLike[str],
        *,
        precision: str = "auto",
        num_threads: int | None = None,
        max_queue_tokens: int = 262144,
        max_queue_ms: float | None = None,
    ) -> None:
        self._bundle = bundle
        self._open_arguments = {"precision": precision, "num_threads": num_threads}
        self._max_queue_tokens = max_queue_tokens
        self._max_queue_ms = max_queue_ms
        self._encoder: Encoder | None = None
        self._scheduler: Scheduler | None = None
        self._awaiter: JobAwaiter | None = None

    @property
    def encoder(self) -> Encoder:
        """The encoder inside.

        Raises:
            ClosedError: Before ``async with``.
        """
        if self._encoder is None:
            raise ClosedError("the AsyncEncoder is not open; use it as 'async with AsyncEncoder(...) as encoder'")
        return self._encoder

    async def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        priority: Priority = "interactive",
        timeout_s: float | None = None,
    ) -> Float32Array:
        """Embed texts as `Encoder.encode` does, in batches shared with other tasks.

        Args:
            sentences: A text or a list of texts.
            prompt_name: As in `Encoder.encode`.
            prompt: As in `Encoder.encode`.
            normalize_embeddings: As in `Encoder.encode`.
            truncate_dim: As in `Encoder.encode`.
            priority: ``interactive`` goes before ``bulk``, which never starves.
            timeout_s: Give up after this many seconds; texts that no batch has taken are then not run.

        Returns:
            float32 (n, dim), or (dim,) for a single text.

        Raises:
            InputError: A text or an argument cannot be used.
            OverloadedError: The queue is full.
            DeadlineError: ``timeout_s`` passed.
            ClosedError: The encoder is not open.
            InferenceError: The model failed on one of these texts.
        """
        encoder = self.encoder
        if self._scheduler is None or self._awaiter is None:
            raise ClosedError("the AsyncEncoder is closed")
        single = isinstance(sentences, str)
        texts = check_texts([sentences] if isinstance(sentences, str) else sentences)
        if not texts:
            return encoder.finish(encoder.embed([]), truncate_dim=truncate_dim)
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            tokens = encoder.tokenize_batch(texts, prompt_name, prompt)
        else:
            tokens = await asyncio.to_thread(encoder.tokenize_batch, texts, prompt_name, prompt)
        job = await self._awaiter.run(self._scheduler, tokens.input_ids, priority=priority, timeout_s=timeout_s)
        vectors = encoder.finish(job.vectors, normalize_embeddings=normalize_embeddings, truncate_dim=truncate_dim)
        return vectors[0] if single else vectors

    async def aclose(self, *, drain: bool = True) -> None:
        """Finish what waits (or fail it, with ``drain=False``) and end the batching thread."""
        if self._scheduler is not None:
            scheduler, self._scheduler = self._scheduler, None
            await asyncio.to_thread(scheduler.close, drain=drain)

    async def __aenter__(self) -> AsyncEncoder:
        if isinstance(self._bundle, Encoder):
            encoder = self._bundle
        else:
            encoder = await asyncio.to_thread(Encoder, self._bundle, **self._open_arguments)  # type: ignore[arg-type]
        self._encoder = encoder
        self._awaiter = JobAwaiter(asyncio.get_running_loop())
        self._scheduler = Scheduler(
            [encoder.embed] * encoder.batches_at_once,
            dim=encoder.get_sentence_embedding_dimension(),
            max_batch_tokens=encoder.max_shared_batch_tokens,
            mixed=encoder.mixes_widths,
            max_queue_tokens=self._max_queue_tokens,
            max_queue_ms=self._max_queue_ms,
            deliver=self._awaiter.deliver,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose(drain=kind is None)
