"""What every embedding route does: texts or ids -> tokens within the limits -> vectors of unit length."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from m3e.server.models import Model
from m3e.server.problems import Problem
from m3e.server.requests import Inputs, Request
from m3e.server.settings import Settings
from m3e.token_queue import Job, Priority
from m3e.tokenizer import TokenIds
from m3e.vectors import normalize

Float32Array = npt.NDArray[np.float32]


async def tokenize(
    model: Model, inputs: Inputs, request: Request, settings: Settings, *, name: str, prompt: str, truncate: bool
) -> TokenIds:
    """Tokenise a request's inputs and hold them to the limits.

    Raises:
        Problem: A text is too long and may not be cut, there are too many tokens together, or the model leaves prompts
            out of its pooling.
    """
    if prompt and not model.manifest.model.include_prompt:
        raise Problem(
            "unsupported_value",
            "This model does not pool its prompts, and requests that share a batch may differ; use Encoder.encode.",
            param="prompt_name",
        )
    started = time.perf_counter()
    if inputs.token_ids:
        tokens = _as_tokens(inputs.token_ids, model.max_seq_length)
    else:
        tokens = await model.tokenize([prompt + text for text in inputs.texts] if prompt else inputs.texts)
    request.timings_s = (time.perf_counter() - started, 0.0, 0.0)
    request.tokens, request.device = tokens, model.worker.device
    request.n_characters = sum(map(len, inputs.texts))
    if not truncate and (cut := np.flatnonzero(tokens.n_tokens_full > tokens.n_tokens)).size:
        where = name if inputs.single else f"{name}[{cut[0]}]"
        n, limit = int(tokens.n_tokens_full[cut[0]]), model.max_seq_length
        raise Problem(
            "context_length_exceeded",
            f"{where} has at least {n} tokens, the model reads at most {limit}; split it, or allow truncation.",
            param=where,
            tei_message=f"Input validation error: `{name}` must have less than {limit} tokens. Given: {n}",
        )
    total = request.n_tokens = sum(map(len, tokens.input_ids))
    if total > settings.max_request_tokens:
        raise Problem(
            "max_tokens_per_request",
            f"{name} has {total} tokens together, a request may have {settings.max_request_tokens}; send fewer texts.",
            param=name,
        )
    return tokens


async def embed(model: Model, input_ids: list[list[int]], request: Request) -> Float32Array:
    """Run token ids.

    Raises:
        ClosedError: The bundle was swapped, or the service is ending.
    """
    job = await model.embed(input_ids, _priority(request, model))
    request.timings_s = (request.timings_s[0], *_times(job))
    return job.vectors


def finish(vectors: Float32Array, dimensions: int | None) -> Float32Array:
    """Keep the first dimensions, then scale to unit length."""
    return normalize(vectors if dimensions is None else vectors[:, :dimensions])


def _priority(request: Request, model: Model) -> Priority:
    """As the client says in X-Priority; otherwise what fills more than one batch is bulk."""
    said = request.headers.get(b"x-priority")
    if said is None:
        return "bulk" if request.n_texts > 1 and request.n_tokens > model.worker.max_batch_tokens else "interactive"
    if said == b"bulk":
        return "bulk"
    if said == b"interactive":
        return "interactive"
    raise Problem("invalid_value", "The header X-Priority is neither 'interactive' nor 'bulk'.", param="x-priority")


def _times(job: Job) -> tuple[float, float]:
    return job.started_at - job.enqueued_at, job.finished_at - job.started_at


def _as_tokens(token_ids: list[list[int]], max_seq_length: int) -> TokenIds:
    full = np.array([len(ids) for ids in token_ids], dtype=np.int64)
    return TokenIds([ids[:max_seq_length] for ids in token_ids], np.minimum(full, max_seq_length), full)
