"""Questions to a server, and looks at its answers that every test of it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.server_process import Server

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
