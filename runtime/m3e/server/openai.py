"""OpenAI's routes: /v1/embeddings and /v1/models."""

from __future__ import annotations

import binascii
from typing import Any

import numpy as np
import orjson

from m3e.server import embedding
from m3e.server.compat import DIM, expand
from m3e.server.models import Model, Models
from m3e.server.problems import Problem, retry_after
from m3e.server.requests import Answer, Request, parse_field, parse_inputs, parse_object
from m3e.server.settings import Settings


class OpenAIRoutes:
    """Handlers of the routes that OpenAI's clients call."""

    def __init__(self, settings: Settings, models: Models) -> None:
        self._settings = settings
        self._models = models

    async def embeddings(self, request: Request) -> Answer:
        """POST /v1/embeddings."""
        settings = self._settings
        content = parse_object(request, settings.max_json_depth)
        model = self._model(parse_field(content, "model", str, None))
        inputs = parse_inputs(content, "input", settings, model.manifest.model.vocab_size)
        request.n_texts = inputs.n
        as_base64 = parse_field(
            content, "encoding_format", str, "float", lambda name: name in ("float", "base64"), "float, base64"
        ) == "base64"  # fmt: skip
        widened = settings.compat == "m3e-large-api"
        dimensions = parse_field(content, "dimensions", int, None)
        limit = DIM if widened else model.dim
        if dimensions is not None and not 1 <= dimensions <= limit:
            raise Problem(
                "unsupported_value", f"dimensions is {dimensions}, expected 1 to {limit}.", param="dimensions"
            )
        parse_field(content, "user", str, None)
        tokens = await embedding.tokenize(
            model, inputs, request, settings, name="input", prompt=model.prompt(None), truncate=settings.auto_truncate
        )
        vectors = await embedding.embed(model, tokens.input_ids, request)
        vectors = embedding.finish(expand(vectors) if widened else vectors, dimensions)
        n_tokens, n_full = tokens.n_tokens.tolist(), tokens.n_tokens_full.tolist()
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": _base64(row) if as_base64 else row,
                "tokens": n_tokens[i],
                "truncated_tokens": n_full[i] - n_tokens[i],
            }
            for i, row in enumerate(vectors)
        ]
        total = sum(n_tokens)
        return Answer(
            orjson.dumps(
                {
                    "object": "list",
                    "data": data,
                    "model": model.name,
                    "usage": {"prompt_tokens": total, "total_tokens": total},
                },
                option=orjson.OPT_SERIALIZE_NUMPY,
            )
        )

    async def models(self, request: Request) -> Answer:
        """GET /v1/models."""
        return Answer(orjson.dumps({"object": "list", "data": [_card(name) for name in self._models.names]}))

    async def model(self, request: Request) -> Answer:
        """GET /v1/models/NAME."""
        name = request.path.removeprefix("/v1/models/")
        if name not in self._models.names:
            raise self._unknown_model()
        return Answer(orjson.dumps(_card(name)))

    def _model(self, name: str | None) -> Model:
        known = name in self._models.names
        if name is not None and not known and not self._settings.accept_any_model:
            raise self._unknown_model()
        model = self._models.get(name) if name is not None and known else self._models.first()
        if model is None:
            raise Problem("not_ready", "The model is still being opened.", headers=retry_after(1.0))
        return model

    def _unknown_model(self) -> Problem:
        names = ", ".join(self._models.names)
        return Problem("model_not_found", f"There is no model of that name here; there is: {names}.", param="model")


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "m3e-runtime"}


def _base64(row: np.ndarray[Any, Any]) -> str:
    return binascii.b2a_base64(row.astype("<f4", copy=False).tobytes(), newline=False).decode("ascii")
