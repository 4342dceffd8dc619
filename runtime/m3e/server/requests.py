"""A request's body -> values of the right type, or the problem that says which field is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from m3e.server.problems import Problem
from m3e.server.settings import Settings
from m3e.tokenizer import TokenIds

_IDS_REFUSED = (
    "input is an array of token ids, and this server takes text. LangChain: set check_embedding_ctx_length=False on "
    "OpenAIEmbeddings, because its ids are those of OpenAI's tokenizer and mean other words here. If the ids really "
    "are of this model's vocabulary, start the server with --accept-token-ids."
)


@dataclass(slots=True)
class Request:
    """One request, whole.

    Attributes:
        route: The template of its path, or ``unmatched``.
        n_held_bytes: What has come of the body.
        timings_s: What the answer's headers will say: tokenization, queue, inference.
        tokens: The texts' tokens, once known.
        device: What runs them.
        end_span: Told the status of the answer, where requests are traced.
        n_tokens: All of them together.
    """

    method: str
    path: str
    route: str
    headers: dict[bytes, bytes]
    id: bytes
    started_at: float
    body: bytes = b""
    n_texts: int = 0
    n_held_bytes: int = 0
    timings_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tokens: TokenIds | None = None
    n_tokens: int = 0
    n_characters: int = 0
    device: str = ""
    end_span: Callable[[Request, int], None] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a route gives."""

    body: bytes
    content_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    status: int = 200


@dataclass(frozen=True, slots=True)
class Response:
    """What goes over the wire.

    Attributes:
        head: Header lines, but those of the connection itself.
        closes: Whether the connection ends with it.
    """

    status: int
    head: bytes
    body: bytes
    closes: bool


def parse_object(request: Request, max_depth: int) -> dict[str, Any]:
    """Read a body that must be a JSON object.

    Raises:
        Problem: Another content type or encoding, not JSON, nested too deeply, not an object.
    """
    kind = request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise Problem("unsupported_media_type", "Send JSON with the header 'Content-Type: application/json'.")
    if request.headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise Problem("unsupported_media_type", "Compressed bodies are not accepted; send the JSON as it is.")
    try:
        content = orjson.loads(request.body)
    except orjson.JSONDecodeError as error:
        raise Problem("invalid_json", f"The body is not JSON in UTF-8: error at character {error.pos}.") from None
    # Texts may hold brackets too, so this only says when no look is needed.
    if request.body.count(b"[") + request.body.count(b"{") > max_depth and _deeper(content, max_depth):
        raise Problem("invalid_json", f"The body's JSON is nested deeper than {max_depth}.")
    if not isinstance(content, dict):
        raise Problem("invalid_type", "The body is not a JSON object.")
    return content


@dataclass(frozen=True, slots=True)
class Inputs:
    """The texts of a request, or token ids where the server takes them."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    single: bool = False

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.texts) or len(self.token_ids)


def parse_inputs(content: dict[str, Any], name: str, settings: Settings, vocab_size: int) -> Inputs:
    """Read ``input`` or ``inputs``: a text, texts, or (where allowed) one or more arrays of token ids.

    Raises:
        Problem: Missing, empty, of another type, or too many.
    """
    if name not in content:
        raise Problem("missing_required_parameter", f"The field {name} is missing; send a text or a list of texts.",
                      param=name)  # fmt: skip
    value = content[name]
    single = isinstance(value, str)
    items = [value] if single else value
    if not isinstance(items, list):
        raise Problem("invalid_type", f"{name} is {_json_type(value)}, expected a string or an array of strings.",
                      param=name)  # fmt: skip
    if not items:
        raise Problem("empty_input", f"{name} is an empty array.", param=name, tei_message=f"`{name}` cannot be empty")
    if _is_ids(items):
        items, single = [items], True
    if len(items) > settings.max_client_batch_size:
        raise Problem(
            "array_above_max_length",
            f"{name} has {len(items)} items, at most {settings.max_client_batch_size} are allowed.",
            param=name,
            tei_message=f"batch size {len(items)} > maximum allowed batch size {settings.max_client_batch_size}",
        )
    if isinstance(items[0], list):
        return Inputs(token_ids=_parse_ids(items, name, settings, vocab_size), single=single)
    for i, text in enumerate(items):
        where = name if single else f"{name}[{i}]"
        if not isinstance(text, str):
            raise Problem("invalid_type", f"{where} is {_json_type(text)}, expected a string.", param=where)
        if not text and not settings.embed_empty_input:
            raise Problem("empty_input", f"{where} is the empty string.", param=where,
                          tei_message=f"Input validation error: `{name}` cannot be empty")  # fmt: skip
    return Inputs(texts=items, single=single)


def _parse_ids(items: list[Any], name: str, settings: Settings, vocab_size: int) -> list[list[int]]:
    if not settings.accept_token_ids:
        raise Problem("token_ids_not_accepted", _IDS_REFUSED, param=name)
    for i, ids in enumerate(items):
        where = f"{name}[{i}]"
        if not isinstance(ids, list) or not _is_ids(ids):
            raise Problem("invalid_type", f"{where} is not an array of token ids like the first.", param=where)
        if not all(0 <= token < vocab_size for token in ids):
            raise Problem("invalid_token_id", f"{where} has a token id outside 0 to {vocab_size - 1}.", param=where)
    return [[as_integer(token) for token in ids] for ids in items]


def parse_field(
    content: dict[str, Any], name: str, kind: type, default: Any, accept: Callable[[Any], bool] | None = None,
    expected: str = "",
) -> Any:  # fmt: skip
    """Read an optional field; null counts as absent.

    Raises:
        Problem: It has another type, or a value that is not accepted.
    """
    value = content.get(name)
    if value is None:
        return default
    if kind is int:
        value = as_integer(value)
    if type(value) is not kind:
        wanted = {str: "a string", bool: "true or false", int: "an integer", dict: "an object"}[kind]
        raise Problem("invalid_type", f"{name} is {_json_type(value)}, expected {wanted}.", param=name)
    if accept is not None and not accept(value):
        raise Problem("invalid_value", f"{name} is not one of the accepted values: {expected}.", param=name)
    return value


def as_integer(value: Any) -> Any:
    """What is an integer to JSON Schema, such as 30.0, as an int; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_ids(items: list[Any]) -> bool:
    return bool(items) and all(type(as_integer(item)) is int for item in items)


def _deeper(content: Any, max_depth: int) -> bool:
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(max_depth):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
