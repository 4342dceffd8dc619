"""One encoder, many threads: their texts share batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType

import numpy as np
import numpy.typing as npt

from m3e.encoder import Encoder
from m3e.errors import DeadlineError
from m3e.scheduler import Scheduler
from m3e.token_queue import Job, Priority
from m3e.tokenizer import check_texts

Float32Array = npt.NDArray[np.float32]


class Batcher:
    """Embeds for many threads at once. A context manager; without it, call `close`.

    A lone caller waits for nobody. While as many batches run as the encoder has threads, texts gather, and those of
    similar length share the next.

    Args:
        encoder: An encoder, or a bundle's folder to open one on.
        max_queue_tokens: Bound on the tokens that wait.
        max_batch_tokens: Bound on a batch, each text widened to its width; None for what the device is fastest with.
    """

    def __init__(
        self,
        encoder: Encoder | str | os.PathLike[str],
        *,
        max_queue_tokens: int = 262144,
        max_batch_tokens: int | None = None,
    ) -> None:
        self.encoder = encoder if isinstance(encoder, Encoder) else Encoder(encoder)
        self._scheduler = Scheduler(
            [self.encoder.embed] * self.encoder.batches_at_once,
            dim=self.encoder.get_sentence_embedding_dimension(),
            max_queue_tokens=max_queue_tokens,
            max_batch_tokens=max_batch_tokens or self.encoder.max_shared_batch_tokens,
            mixed=self.encoder.mixes_widths,
        )

    def encode(
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
        """Embed texts as `Encoder.encode` does, in batches shared with other threads.

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
            ClosedError: The batcher was closed.
            InferenceError: The model failed on one of these texts.
        """
        single = isinstance(sentences, str)
        texts = check_texts([sentences] if isinstance(sentences, str) else sentences)
        tokens = self.encoder.tokenize_batch(texts, prompt_name, prompt)
        if not texts:
            return self.encoder.finish(self.encoder.embed([]), truncate_dim=truncate_dim)
        future: Future[Job] = Future()
        job = self._scheduler.submit(tokens.input_ids, future.set_result, priority=priority, timeout_s=timeout_s)
        try:
            future.result(timeout_s)
        except TimeoutError as error:
            raise DeadlineError(f"no answer within {timeout_s} s") from error
        finally:
            self._scheduler.cancel(job)  # also when the caller is interrupted
        if job.error is not None:
            raise job.error
        vectors = self.encoder.finish(job.vectors, normalize_embeddings=normalize_embeddings, truncate_dim=truncate_dim)
        return vectors[0] if single else vectors

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Finish what waits (or fail it, with ``drain=False``) and end the batcher's thread."""
        self._scheduler.close(drain=drain, timeout_s=timeout_s)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)
