"""The OpenAPI document, written from the settings that the server enforces."""

from __future__ import annotations

from typing import Any

from m3e import __version__
from m3e.server.compat import DIM
from m3e.server.models import Model
from m3e.server.settings import Settings

_OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_TEI_ERROR = {
    "type": "object",
    "required": ["error", "error_type"],
    "properties": {
        "error": {"type": "string"},
        "error_type": {"enum": ["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]},
    },
}
_VECTOR = {"type": "array", "items": {"type": "number"}}
_AT_LEAST = "Tokens that were cut off; of a text beyond 8,192 characters at least so many."
_COUNTS = {
    "X-Input-Tokens": {
        "description": "Tokens of each input; where one was cut, tokens/tokens before, of a text beyond 8,192 "
        "characters at least so many before. Left out beyond 256 inputs.",
        "schema": {"type": "string"},
    }
}


def document(settings: Settings, names: list[str], model: Model | None) -> dict[str, Any]:
    """Describe every route: what it takes with its limits, and every answer.

    Args:
        settings: Of the server.
        names: Of the models.
        model: The first, if it is open; its dimensions and prompts then appear.
    """
    text: dict[str, Any] = {"type": "string"} if settings.embed_empty_input else {"type": "string", "minLength": 1}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": settings.max_client_batch_size}
    inputs: dict[str, Any] = {"anyOf": [text, texts]}
    if settings.accept_token_ids and model is not None:
        ids = {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": model.manifest.model.vocab_size - 1},
            "minItems": 1,
        }
        inputs = {"anyOf": [text, texts, ids, {"type": "array", "items": ids, "minItems": 1}]}
    dim = DIM if settings.compat == "m3e-large-api" else (model.dim if model is not None else None)
    dimensions: dict[str, Any] = {"type": ["integer", "null"], "minimum": 1}
    tei_dimensions = dict(dimensions)
    if model is not None:
        dimensions["maximum"], tei_dimensions["maximum"] = dim, model.dim
    prompts = [*(model.manifest.model.prompts if model is not None else ())]
    named: dict[str, Any] = {"type": ["string", "null"]} if settings.accept_any_model else {"enum": [*names, None]}
    truncation = {
        "truncate": {"type": ["boolean", "null"]},
        "truncation_direction": {"enum": ["right", "Right", None]},
        "prompt_name": {"enum": [*prompts, None]},
    }
    priority = {"name": "X-Priority", "in": "header", "schema": {"enum": ["interactive", "bulk"]}}
    embed = _post(
        "Embed texts: a list of vectors, also for a single text.",
        _object(
            {"inputs": inputs, **truncation, "normalize": {"type": ["boolean", "null"]}, "dimensions": tei_dimensions},
            ["inputs"],
        ),
        {"type": "array", "items": _VECTOR},
        _TEI_ERROR, tei=True, headers=_COUNTS, parameters=[priority],
    )  # fmt: skip
    openai = _post(
        "Embed texts as OpenAI does.",
        _object(
            {
                "input": inputs,
                "model": named,
                "encoding_format": {"enum": ["float", "base64", None]},
                "dimensions": dimensions,
                "user": {"type": ["string", "null"]},
            },
            ["input"],
        ),
        _object(
            {
                "object": {"const": "list"},
                "model": {"enum": names},
                "data": {
                    "type": "array",
                    "items": _object(
                        {
                            "object": {"const": "embedding"},
                            "index": {"type": "integer"},
                            "embedding": {"anyOf": [_VECTOR, {"type": "string"}]},
                            "tokens": {"type": "integer"},
                            "truncated_tokens": {"type": "integer", "description": _AT_LEAST},
                        },
                        ["object", "index", "embedding", "tokens", "truncated_tokens"],
                    ),
                },
                "usage": _object(
                    {"prompt_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"}},
                    ["prompt_tokens", "total_tokens"],
                ),
            },
            ["object", "model", "data", "usage"],
        ),
        _OPENAI_ERROR, parameters=[priority],
    )  # fmt: skip
    card = _object(
        {"id": {"enum": names}, "object": {"const": "model"}, "created": {"type": "integer"},
         "owned_by": {"type": "string"}},
        ["id", "object", "created", "owned_by"],
    )  # fmt: skip
    token = _object(
        {"id": {"type": "integer"}, "text": {"type": "string"}, "special": {"type": "boolean"},
         "start": {"type": ["integer", "null"]}, "stop": {"type": ["integer", "null"]}},
        ["id", "text", "special", "start", "stop"],
    )  # fmt: skip
    vocab = {"maximum": model.manifest.model.vocab_size - 1} if model is not None else {}
    row = {"type": "array", "items": {"type": "integer", "minimum": 0, **vocab}}
    rows = {"type": "array", "items": row, "minItems": 1, "maxItems": settings.max_client_batch_size}
    may_be_calibrated = [True] if model is not None and model.calibration is not None else []
    similarity = _object(
        {
            "inputs": _object(
                {"source_sentence": text, "sentences": {**texts, "maxItems": settings.max_client_batch_size - 1}},
                ["source_sentence", "sentences"],
            ),
            "parameters": {
                "type": ["object", "null"],
                "properties": {**truncation, "calibrated": {"enum": [*may_be_calibrated, False, None]}},
            },
        },
        ["inputs"],
    )
    one = {"name": "name", "in": "path", "required": True, "schema": {"enum": names}}
    paths: dict[str, Any] = {
        "/v1/embeddings": {"post": openai},
        "/embeddings": {"post": openai},
        "/v1/models": {
            "get": _get("The models served.", _object({"object": {"const": "list"}, "data": {"type": "array", "items":
                        card}}, ["object", "data"]), _OPENAI_ERROR)
        },
        "/v1/models/{name}": {"get": _get("One of them.", card, _OPENAI_ERROR, parameters=[one])},
        "/embed": {"post": embed},
        "/": {"post": embed},
        "/embed_all": {
            "post": _post(
                "A vector for every token, not normalised.",
                _object({"inputs": inputs, **truncation}, ["inputs"]),
                {"type": "array", "items": {"type": "array", "items": _VECTOR}},
                _TEI_ERROR, tei=True, headers=_COUNTS,
            )
        },
        "/tokenize": {
            "post": _post(
                "Tokens with their byte offsets.",
                _object(
                    {"inputs": {"anyOf": [text, texts]}, "add_special_tokens": {"type": ["boolean", "null"]},
                     "prompt_name": truncation["prompt_name"]},
                    ["inputs"],
                ),
                {"type": "array", "items": {"type": "array", "items": token}},
                _TEI_ERROR, tei=True,
            )
        },
        "/decode": {
            "post": _post(
                "Ids back to texts.",
                _object(
                    {"ids": {"anyOf": [{**row, "minItems": 1}, rows]},
                     "skip_special_tokens": {"type": ["boolean", "null"]}},
                    ["ids"],
                ),
                {"type": "array", "items": {"type": "string"}},
                _TEI_ERROR, tei=True,
            )
        },
        "/similarity": {
            "post": _post(
                "Cosines of one sentence with others; calibrated: probabilities that they mean the same.",
                similarity, _VECTOR, _TEI_ERROR, tei=True, headers=_COUNTS,
            )
        },
        "/info": {"get": _get("What is served, and its limits.", {"type": "object"}, _TEI_ERROR)},
        "/health": {"get": _probe("200 when ready, as TEI has it.")},
        "/health/live": {"get": _probe("200 while the process answers.")},
        "/health/ready": {"get": _probe("200 when a request would be run now.")},
        "/metrics": {"get": _other("Prometheus metrics.", "text/plain")},
        "/openapi.json": {"get": _get("This document.", {"type": "object"}, _TEI_ERROR)},
        "/ui": {"get": _other("A page to try sentences on.", "text/html")},
    }  # fmt: skip
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "m3e-runtime", "version": __version__, "description": "Sentence embeddings."},
        "paths": paths,
    }
    if settings.api_key_file or settings.compat:
        described["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        for path, item in paths.items():
            for operation in item.values():
                operation["security"] = [] if path in PUBLIC_PATHS else [{"key": []}]
    return described


# Open without a key: probes must not need one, and the page holds nothing.
PUBLIC_PATHS = ("/health", "/health/live", "/health/ready", "/ui")

_REFUSALS = {
    "openai": ("400", "401", "403", "404", "405", "408", "413", "415", "429", "431", "500", "503", "504"),
    "tei": ("400", "401", "403", "404", "405", "408", "413", "415", "422", "424", "429", "431", "500", "503"),
}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


def _json(description: str, schema: dict[str, Any], headers: dict[str, Any] | None = None) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": description, "content": {"application/json": {"schema": schema}}}
    return {**answer, "headers": headers} if headers else answer


def _refusals(error: dict[str, Any], dialect: str) -> dict[str, Any]:
    return {status: _json("Refused, or failed.", error) for status in _REFUSALS[dialect]}


def _post(
    summary: str, body: dict[str, Any], answer: dict[str, Any], error: dict[str, Any], *,
    tei: bool = False, headers: dict[str, Any] | None = None, parameters: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "summary": summary,
        **({"parameters": parameters} if parameters else {}),
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": _json("Done.", answer, headers), **_refusals(error, "tei" if tei else "openai")},
    }


def _get(
    summary: str, answer: dict[str, Any], error: dict[str, Any], parameters: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    dialect = "openai" if error is _OPENAI_ERROR else "tei"
    return {
        "summary": summary,
        **({"parameters": parameters} if parameters else {}),
        "responses": {"200": _json("Done.", answer), **_refusals(error, dialect)},
    }


def _probe(summary: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": {"description": "Yes; the body is empty."}, **_refusals(_TEI_ERROR, "tei")},
    }


def _other(summary: str, content_type: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "Done.", "content": {content_type: {"schema": {"type": "string"}}}},
            **_refusals(_TEI_ERROR, "tei"),
        },
    }
