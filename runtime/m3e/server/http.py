"""Uvicorn's HTTP/1.1 protocol with what it lacks: absolute deadlines for receiving, bounds on headers, JSON refusals.

It overrides only callbacks that asyncio and httptools name, and `send_400_response`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from m3e.server.problems import Dialect, Problem
from m3e.server.settings import Settings

_MAX_HEADERS = 100
_BODY_BYTES_PER_S = 64 * 1024
_IDLE, _HEAD, _BODY = range(3)
# Java's client asks for HTTP/2 so in every first request. A server may go on in HTTP/1.1 (RFC 9110, 7.8), but the
# parser would take the body for the other protocol's.
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


def dialect_of(path: str) -> Dialect:
    """The dialect that a path's clients read: OpenAI's on every /v1 path, also mis-joined ones."""
    return "openai" if path.startswith("/v1") or path.endswith("/embeddings") else "tei"


class _Outgoing:
    """A connection's transport that can hold writes back, for them to leave in one system call."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: list[bytes] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def hold(self) -> None:
        """Keep what is written from now on."""
        self._held = []

    def release(self) -> None:
        """Write what was kept."""
        held, self._held = self._held, None
        if held:
            self._transport.write(b"".join(held))

    def write(self, data: bytes) -> None:
        """Write, or keep it."""
        if self._held is None:
            self._transport.write(data)
        else:
            self._held.append(data)

    def close(self) -> None:
        """Close behind what was kept."""
        self.release()
        self._transport.close()


class Protocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        on_lost: Called once when the client goes before it has its answer.
    """

    settings: Settings  # set on a subclass, because uvicorn makes the instances

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.on_lost: Callable[[], Any] | None = None
        self._phase = _IDLE
        self._n_head_bytes = 0
        self._n_headers = 0
        self._n_begun = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._refusal: Problem | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the time from the first moment: a connection that sends nothing is closed too."""
        self._outgoing = _Outgoing(transport)
        super().connection_made(self._outgoing)  # type: ignore[arg-type]
        self._arm(self.settings.header_timeout_s)

    @contextlib.contextmanager
    def one_write(self) -> Iterator[None]:
        """Send an answer's headers and its body together: a second system call costs as much as parsing a request."""
        self._outgoing.hold()
        try:
            yield
        finally:
            self._outgoing.release()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request's task, so that its texts are not run for nobody."""
        self._disarm()
        super().connection_lost(exc)
        if self.on_lost is not None:
            on_lost, self.on_lost = self.on_lost, None
            on_lost()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; keep one absolute deadline for each part of a request that is not whole yet."""
        before, n_begun = self._phase, self._n_begun
        if before != _BODY:
            self._n_head_bytes += len(data)
            if _UPGRADE.search(data):
                head, end, rest = data.partition(b"\r\n\r\n")
                data = _UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest
        super().data_received(data)
        if self.transport.is_closing():
            self._disarm()
        elif self._phase == _HEAD and self._n_head_bytes > self.settings.max_header_bytes:
            self._refuse(self._too_large())
        elif self._phase == _IDLE:
            if self._n_begun > n_begun or before != _IDLE:
                self._disarm()
            elif self._deadline is None and (self.cycle is None or self.cycle.response_complete):
                self._arm(self.settings.header_timeout_s)  # an empty line begins nothing, and ends no wait
        elif self._phase != before or self._deadline is None:
            self._arm(self.settings.header_timeout_s if self._phase == _HEAD else self._body_timeout_s())

    def on_message_begin(self) -> None:
        """A request starts."""
        super().on_message_begin()
        self._phase = _HEAD
        self._n_begun += 1
        self._n_headers = 0
        self._n_header_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count headers and their bytes."""
        self._n_headers += 1
        self._n_header_bytes += len(name) + len(value)
        if self._n_headers > _MAX_HEADERS or self._n_header_bytes > self.settings.max_header_bytes:
            self._refusal = self._too_large()
            raise ValueError(self._refusal.message)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the app, with this connection so that it may listen for the client leaving."""
        self._phase = _BODY
        self.scope["extensions"] = {"m3e": self}  # type: ignore[dict-item]
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._phase = _IDLE
        self._n_head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or too much of it, in JSON."""
        self._refuse(self._refusal or Problem("bad_http", "The request is not valid HTTP/1.1."))

    def _body_timeout_s(self) -> float:
        announced = next((value for name, value in self.headers if name == b"content-length"), b"0")
        bound = min(int(announced) if announced.isdigit() else 0, self.settings.max_body_bytes)
        return self.settings.body_timeout_s + bound / _BODY_BYTES_PER_S

    def _too_large(self) -> Problem:
        return Problem(
            "header_fields_too_large",
            f"The headers are larger than {self.settings.max_header_bytes} bytes or more than {_MAX_HEADERS}.",
        )

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        part = "body" if self._phase == _BODY else "headers"
        self._refuse(Problem("request_timeout", f"The request's {part} did not arrive in time."))

    def _refuse(self, problem: Problem) -> None:
        """Answer on the bare connection and close it; if an answer has begun, only close."""
        if self.transport.is_closing():
            return
        busy = self._phase != _HEAD and self.cycle is not None and self.cycle.response_started
        if not busy or self.cycle.response_complete:
            url = self.url.decode("ascii", "replace") if getattr(self, "url", b"") else ""
            dialect = dialect_of(url)
            body = problem.body(dialect)
            self.transport.write(
                STATUS_LINE[problem.status(dialect)]
                + b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
                + body
            )
        self.transport.close()
