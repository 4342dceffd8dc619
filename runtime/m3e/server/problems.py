"""Every refusal, in the two dialects that clients read. No message ever holds a client's text."""

from __future__ import annotations

from typing import Any, Literal

import orjson

from m3e.errors import ClosedError, DeadlineError, InputError, M3EError, OverloadedError, StartError

Dialect = Literal["openai", "tei"]

# For each code: status on /v1 routes, its type there; status on TEI's routes, its type there.
_KINDS: dict[str, tuple[int, str, int, str]] = {
    "invalid_json": (400, "invalid_request_error", 400, "Validation"),
    "unsupported_media_type": (415, "invalid_request_error", 415, "Validation"),
    "content_too_large": (413, "invalid_request_error", 413, "Validation"),
    "header_fields_too_large": (431, "invalid_request_error", 431, "Validation"),
    "request_timeout": (408, "invalid_request_error", 408, "Validation"),
    "bad_http": (400, "invalid_request_error", 400, "Validation"),
    "missing_required_parameter": (400, "invalid_request_error", 422, "Validation"),
    "invalid_type": (400, "invalid_request_error", 422, "Validation"),
    "invalid_value": (400, "invalid_request_error", 422, "Validation"),
    "unsupported_value": (400, "invalid_request_error", 422, "Validation"),
    "empty_input": (400, "invalid_request_error", 400, "Empty"),
    "array_above_max_length": (400, "invalid_request_error", 422, "Validation"),
    "max_tokens_per_request": (400, "invalid_request_error", 422, "Validation"),
    "context_length_exceeded": (400, "invalid_request_error", 422, "Validation"),
    "token_ids_not_accepted": (400, "invalid_request_error", 422, "Validation"),
    "invalid_token_id": (400, "invalid_request_error", 422, "Validation"),
    "no_token_vectors": (400, "invalid_request_error", 424, "Backend"),
    "model_not_found": (404, "invalid_request_error", 404, "Validation"),
    "invalid_api_key": (401, "invalid_request_error", 401, "Validation"),
    "host_not_allowed": (403, "invalid_request_error", 403, "Validation"),
    "not_found": (404, "invalid_request_error", 404, "Validation"),
    "method_not_allowed": (405, "invalid_request_error", 405, "Validation"),
    "server_is_overloaded": (429, "rate_limit_error", 429, "Overloaded"),
    "shutting_down": (503, "service_unavailable_error", 503, "Unhealthy"),
    "not_ready": (503, "service_unavailable_error", 503, "Unhealthy"),
    "deadline_exceeded": (504, "timeout_error", 424, "Backend"),
    "inference_failed": (500, "server_error", 424, "Backend"),
    "internal_error": (500, "server_error", 500, "Backend"),
}


KIND_NAMES = tuple(_KINDS)


class Problem(Exception):  # noqa: N818 (an answer, not an error of ours)
    """An answer other than the one asked for.

    Args:
        code: One of the kinds above; it decides the status.
        message: What came, what was expected, what to do; nothing of the request's texts.
        param: The field at fault, such as ``input[3]``.
        tei_message: Where TEI's clients know a sentence by heart.
        headers: Further headers.
        closes: Whether the connection ends with it.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        tei_message: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.tei_message = tei_message
        self.headers = headers
        self.closes = closes

    def status(self, dialect: Dialect) -> int:
        """The HTTP status in a dialect."""
        openai, _, tei, _ = _KINDS[self.code]
        return openai if dialect == "openai" else tei

    def body(self, dialect: Dialect) -> bytes:
        """The JSON in a dialect."""
        _, openai_type, _, tei_type = _KINDS[self.code]
        content: dict[str, Any]
        if dialect == "tei":
            content = {"error": self.tei_message or self.message, "error_type": tei_type}
        else:
            content = {"error": {"message": self.message, "type": openai_type, "param": self.param, "code": self.code}}
        return orjson.dumps(content)


def dialect_of(path: str) -> Dialect:
    """The dialect that a path's clients read: OpenAI's on every /v1 path, also mis-joined ones."""
    return "openai" if path.startswith("/v1") or path.endswith("/embeddings") else "tei"


def problem_of(error: M3EError) -> Problem:
    """Turn an error of the library into an answer; of a failed model nothing but that it failed."""
    if isinstance(error, OverloadedError):
        return Problem(
            "server_is_overloaded",
            f"The model is overloaded: {error}",
            tei_message="Model is overloaded",
            headers=retry_after(error.retry_after_s),
        )
    if isinstance(error, DeadlineError):
        return Problem(
            "deadline_exceeded",
            "The request was not answered within its time; send fewer texts, or later.",
            tei_message="Backend error: deadline exceeded",
            headers=((b"x-should-retry", b"false"),),
        )
    if isinstance(error, ClosedError):
        return Problem("shutting_down", "The server is shutting down.", tei_message="unhealthy",
                       headers=retry_after(1.0), closes=True)  # fmt: skip
    if isinstance(error, StartError):
        return Problem("not_ready", "The model cannot be run now; the server's log says why.", tei_message="unhealthy",
                       headers=retry_after(1.0))  # fmt: skip
    if isinstance(error, InputError):
        return Problem("invalid_value", str(error), param="input")
    return Problem(
        "inference_failed",
        "The model failed on a text of this request; the server's log has the request id.",
        tei_message="Backend error: inference failed",
    )


def retry_after(seconds: float) -> tuple[tuple[bytes, bytes], ...]:
    """Both headers that say when to come back: whole seconds for HTTP, milliseconds for OpenAI's clients."""
    milliseconds = max(1, round(seconds * 1000))
    return (
        (b"retry-after", str(max(1, -(-milliseconds // 1000))).encode()),
        (b"retry-after-ms", str(milliseconds).encode()),
    )
