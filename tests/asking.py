"""Questions to a server, and looks at its answers that every test of it takes."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.server_process import Reply, Server

TEXTS = ["今天天气真好", "How do I reset my password?", " ", "a 🍜 “quoted”", "长" * 700]
PLAIN = [f"今天天气真好 {i}" for i in range(40)]


def ask(server: Server, text: str) -> tuple[str, int, Any]:
    """The text, the status and the content of the answer, in which nothing is NaN or null."""
    reply = server.post("/v1/embeddings", {"input": text}, timeout=60)
    assert b"NaN" not in reply.body
    assert b"null,null" not in reply.body
    return text, reply.status, reply.json


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something is so."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def vectors(reply: Reply) -> np.ndarray[Any, Any]:
    """The rows of an answer of either dialect: float32 (n, dim)."""
    assert reply.status == 200, reply.body
    content = reply.json
    rows = [item["embedding"] for item in content["data"]] if isinstance(content, dict) else content
    if isinstance(rows[0], str):
        return np.stack([np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows])
    return np.array(rows, dtype=np.float32)


def assert_openai_error(reply: Reply, status: int, param: str | None, code: str) -> None:
    """A refusal as OpenAI's service words it."""
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json"), reply.body
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert reply.headers["x-request-id"]


def assert_tei_error(reply: Reply, status: int, type_: str, message: str | None = None) -> None:
    """A refusal as text-embeddings-inference words it."""
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json"), reply.body
    assert set(reply.json) == {"error", "error_type"}
    assert reply.json["error_type"] == type_
    assert message is None or reply.json["error"] == message
