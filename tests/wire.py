"""HTTP/1.1 as bytes on loopback, where a client library would get in the way."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """An answer, read whole."""

    status: int
    closes: bool
    body: bytes


def head(length: int, path: str = "/embed") -> bytes:
    """The headers of a request with a body of so many bytes."""
    return (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


def embed(inputs: Any) -> bytes:
    """A whole request for the vectors of some texts."""
    body = json.dumps({"inputs": inputs}, ensure_ascii=False).encode()
    return head(len(body)) + body


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Read an answer.

    Raises:
        OSError: The connection broke.
        asyncio.IncompleteReadError: It was closed before the answer was whole.
    """
    headers = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(headers.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return Answer(int(headers[9:12]), b"\r\nconnection: close\r\n" in headers, await reader.readexactly(length))
