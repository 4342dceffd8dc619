"""The routes of text-embeddings-inference: /embed, /embed_all, /tokenize, /decode, /similarity, /info and /."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import orjson

from m3e import __version__
from m3e.errors import DeadlineError, InputError
from m3e.server import embedding
from m3e.server.models import Model, Models
from m3e.server.problems import Problem, retry_after
from m3e.server.requests import Answer, Inputs, Request, as_integer, parse_field, parse_inputs, parse_object
from m3e.server.settings import Settings
from m3e.tokenizer import TokenIds
from m3e.vectors import similarity

_DIRECTIONS = ("right", "Right")
# Inputs for which the counts fit a header that every client reads.
_MAX_COUNTS = 256
_MAX_TOKEN_VECTOR_REQUESTS = 8
# As JSON they are about three times as much.
_MAX_TOKEN_VECTOR_BYTES = 64 << 20


class TEIRoutes:
    """Handlers of TEI's routes; they speak for the first bundle."""

    def __init__(self, settings: Settings, models: Models) -> None:
        self._settings = settings
        self._models = models
        self._n_token_vector_requests = 0

    async def embed(self, request: Request) -> Answer:
        """POST /embed and POST /."""
        content, model = self._open(request)
        inputs = self._inputs(content, model, request)
        normalized = parse_field(content, "normalize", bool, True)
        dimensions = parse_field(content, "dimensions", int, None)
        if dimensions is not None and dimensions < 1:
            raise Problem("unsupported_value", "Input validation error: `dimensions` should be positive",
                          param="dimensions")  # fmt: skip
        if dimensions is not None and dimensions > model.dim:
            raise Problem(
                "unsupported_value",
                "Input validation error: `dimensions` should be smaller than the maximum embedding dimension.",
                param="dimensions",
            )
        tokens = await self._tokenize(content, model, inputs, request)
        vectors = await embedding.embed(model, tokens.input_ids, request)
        vectors = embedding.finish(vectors, dimensions) if normalized else vectors[:, :dimensions]
        body = orjson.dumps(list(vectors), option=orjson.OPT_SERIALIZE_NUMPY)
        return Answer(body, headers=_counts(tokens))

    async def embed_all(self, request: Request) -> Answer:
        """POST /embed_all: a vector for every token, not normalised."""
        content, model = self._open(request)
        inputs = self._inputs(content, model, request)
        if not model.gives_token_vectors:
            raise Problem(
                "no_token_vectors",
                "Backend error: this bundle gives no token vectors; convert again with --with-token-embeddings",
            )
        tokens = await self._tokenize(content, model, inputs, request)
        n_most = _MAX_TOKEN_VECTOR_BYTES // (4 * model.manifest.model.hidden_size)
        if request.n_tokens > n_most:
            raise Problem(
                "max_tokens_per_request",
                f"inputs has {request.n_tokens} tokens together, /embed_all gives the vectors of {n_most} at most; "
                "send fewer texts.",
                param="inputs",
            )
        if self._n_token_vector_requests >= _MAX_TOKEN_VECTOR_REQUESTS:
            raise Problem("server_is_overloaded", "Model is overloaded", headers=retry_after(1.0))
        self._n_token_vector_requests += 1

        def of_text(input_ids: list[int]) -> bytes:
            return orjson.dumps(model.worker.embed_tokens(input_ids), option=orjson.OPT_SERIALIZE_NUMPY)

        timeout_s = self._settings.request_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                parts = [await asyncio.to_thread(of_text, ids) for ids in tokens.input_ids]
        except TimeoutError as error:
            raise DeadlineError(f"no answer within {timeout_s} s") from error
        finally:
            self._n_token_vector_requests -= 1
        return Answer(b"[" + b",".join(parts) + b"]", headers=_counts(tokens))

    async def tokenize(self, request: Request) -> Answer:
        """POST /tokenize: ids, texts and byte offsets of the tokens, without truncation."""
        content, model = self._open(request)
        inputs = self._texts(content, model, request)
        special = parse_field(content, "add_special_tokens", bool, True)
        prompt = _prompt(content, model)
        texts = [prompt + text for text in inputs.texts]

        def tokens() -> bytes:
            found = zip(texts, model.tokenizer.encode_with_offsets(texts, special), strict=True)
            return orjson.dumps([_tokens(text, encoding) for text, encoding in found])

        return Answer(await asyncio.to_thread(tokens))

    async def decode(self, request: Request) -> Answer:
        """POST /decode: ids back to texts."""
        content, model = self._open(request)
        ids = content.get("ids")
        rows = [ids] if isinstance(ids, list) and ids and not isinstance(ids[0], list) else ids
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
            raise Problem("invalid_type" if "ids" in content else "missing_required_parameter",
                          "ids must be an array of token ids, or an array of such arrays.", param="ids")  # fmt: skip
        size = model.manifest.model.vocab_size
        if len(rows) > self._settings.max_client_batch_size:
            limit = self._settings.max_client_batch_size
            raise Problem(
                "array_above_max_length", f"ids has {len(rows)} items, at most {limit} are allowed.", param="ids"
            )
        rows = [[as_integer(token) for token in row] for row in rows]
        if not all(type(token) is int and 0 <= token < size for row in rows for token in row):
            raise Problem("invalid_token_id", f"ids must be integers from 0 to {size - 1}.", param="ids")
        skip = parse_field(content, "skip_special_tokens", bool, True)
        texts = await asyncio.to_thread(model.tokenizer.decode, rows, skip)
        return Answer(orjson.dumps(texts))

    async def similarity(self, request: Request) -> Answer:
        """POST /similarity: cosines of one sentence with others, or what the bundle's calibration makes of them."""
        content, model = self._open(request)
        inputs = parse_field(content, "inputs", dict, None)
        if inputs is None:
            raise Problem("missing_required_parameter", "The field inputs is missing.", param="inputs")
        source = parse_inputs(inputs, "source_sentence", self._settings, 0)
        others = parse_inputs(inputs, "sentences", self._settings, 0)
        if not isinstance(inputs["source_sentence"], str) or not isinstance(inputs["sentences"], list):
            raise Problem("invalid_type", "source_sentence must be a string and sentences an array.", param="inputs")
        parameters = parse_field(content, "parameters", dict, {})
        calibration = model.calibration if parse_field(parameters, "calibrated", bool, False) else None
        if calibration is None and parameters.get("calibrated"):
            raise Problem("unsupported_value", "This bundle is not calibrated; run m3e calibrate, then reload.",
                          param="parameters.calibrated")  # fmt: skip
        texts = Inputs(texts=[*source.texts, *others.texts])
        if texts.n > self._settings.max_client_batch_size:
            limit = self._settings.max_client_batch_size
            raise Problem(
                "array_above_max_length", f"inputs has {texts.n} texts, at most {limit} are allowed.", param="inputs"
            )
        request.n_texts = texts.n
        tokens = await self._tokenize(parameters, model, texts, request)
        vectors = await embedding.embed(model, tokens.input_ids, request)
        if calibration is None:
            scores = similarity(vectors[0], vectors[1:])[0]
        else:
            scores = calibration(similarity(vectors[0], vectors[1:], calibration.similarity_fn_name)[0])
        body = orjson.dumps(scores, option=orjson.OPT_SERIALIZE_NUMPY)
        return Answer(body, headers=_counts(tokens))

    async def info(self, request: Request) -> Answer:
        """GET /info."""
        model, settings = self._ready_model(), self._settings
        facts = {
            "model_id": model.name,
            "model_sha": model.manifest.source.revision,
            "model_dtype": {"fp32": "float32", "fp16": "float16"}.get(model.graph.precision, model.graph.precision),
            "served_model_name": model.name,
            "model_type": {"embedding": {"pooling": model.manifest.model.pooling[0]}},
            "max_concurrent_requests": settings.max_queue_tokens,
            "max_input_length": model.max_seq_length,
            "max_batch_tokens": model.worker.max_batch_tokens,
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_client_batch_size,
            "auto_truncate": settings.auto_truncate,
            "tokenization_workers": 1,
            "version": __version__,
            "sha": None,
            "docker_label": None,
            "source": model.manifest.source.id,
            "space_id": model.manifest.space_id,
            "embedding_dim": model.dim,
            "prompts": list(model.manifest.model.prompts),
        }
        return Answer(orjson.dumps(facts))

    def _open(self, request: Request) -> tuple[dict[str, Any], Model]:
        return parse_object(request, self._settings.max_json_depth), self._ready_model()

    def _ready_model(self) -> Model:
        model = self._models.first()
        if model is None:
            raise Problem("not_ready", "unhealthy", headers=retry_after(1.0))
        return model

    def _inputs(self, content: dict[str, Any], model: Model, request: Request) -> Inputs:
        inputs = parse_inputs(content, "inputs", self._settings, model.manifest.model.vocab_size)
        request.n_texts = inputs.n
        return inputs

    def _texts(self, content: dict[str, Any], model: Model, request: Request) -> Inputs:
        inputs = self._inputs(content, model, request)
        if inputs.token_ids:
            raise Problem("invalid_type", "inputs must be text here.", param="inputs")
        return inputs

    async def _tokenize(self, content: dict[str, Any], model: Model, inputs: Inputs, request: Request) -> TokenIds:
        direction = content.get("truncation_direction")
        if direction not in (None, *_DIRECTIONS):
            known = direction in ("left", "Left")
            raise Problem(
                "unsupported_value" if known else "invalid_value",
                "truncation_direction is not 'right', the only one that this server knows.",
                param="truncation_direction",
            )
        truncate = parse_field(content, "truncate", bool, self._settings.auto_truncate)
        return await embedding.tokenize(
            model, inputs, request, self._settings, name="inputs", prompt=_prompt(content, model), truncate=truncate
        )


def _prompt(content: dict[str, Any], model: Model) -> str:
    try:
        return model.prompt(parse_field(content, "prompt_name", str, None))
    except InputError as error:
        raise Problem("invalid_value", str(error), param="prompt_name") from None


def _counts(tokens: TokenIds) -> tuple[tuple[bytes, bytes], ...]:
    """Per input: its tokens, and where it was cut those it had, as in ``12,512/604``; see `TokenIds.n_tokens_full`."""
    if len(tokens.n_tokens) > _MAX_COUNTS:
        return ()
    parts = [
        str(n) if n == full else f"{n}/{full}"
        for n, full in zip(tokens.n_tokens.tolist(), tokens.n_tokens_full.tolist(), strict=True)
    ]
    return ((b"x-input-tokens", ",".join(parts).encode()),)


def _tokens(text: str, encoding: list[tuple[int, str, bool, int, int]]) -> list[dict[str, Any]]:
    """TEI counts a token's place in bytes."""
    bytes_before = [0, *itertools.accumulate(len(character.encode()) for character in text)]
    return [
        {"id": token_id, "text": word, "special": True, "start": None, "stop": None}
        if special
        else {
            "id": token_id,
            "text": text[start:stop],
            "special": False,
            "start": bytes_before[start],
            "stop": bytes_before[stop],
        }
        for token_id, word, special, start, stop in encoding
    ]
