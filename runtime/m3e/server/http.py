"""Uvicorn's HTTP/1.1 protocol with what it lacks: absolute deadlines both ways, bounds on headers, JSON refusals.

Uvicorn parses, keeps the order of pipelined requests and the flow. Between it and the service go whole responses, not
ASGI's messages: one write each, and no task for what its headers alone decide against.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from m3e.errors import ClosedError
from m3e.server.app import App
from m3e.server.problems import Problem
from m3e.server.requests import Request, Response

_MAX_HEADERS = 100
_BODY_BYTES_PER_S = 64 * 1024
_IDLE, _HEAD, _BODY = range(3)
# Java's client asks for HTTP/2 so in every first request. A server may go on in HTTP/1.1 (RFC 9110, 7.8), but the
# parser would take the body for the other protocol's.
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class Protocol(HttpToolsProtocol):
    """One connection."""

    service: App  # set on a subclass, because uvicorn makes the instances

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._settings = self.service.settings
        self._task: asyncio.Task[None] | None = None
        self._phase = _IDLE
        self._n_head_bytes = 0
        self._n_headers = 0
        self._n_begun = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._untaken: asyncio.TimerHandle | None = None  # until the client has to have taken what was sent
        self._too_much: Problem | None = None  # what a callback stopped the parser for
        self._last: Problem | None = None  # said once everything before is answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the time from the first moment: a connection that sends nothing is closed too."""
        super().connection_made(transport)
        self._arm(self._settings.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the request's task, so that its texts are not run for nobody."""
        self._disarm()
        self._expect_no_reader()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        if self._task is not None:
            self._task.cancel()

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
        elif self._phase == _HEAD and self._n_head_bytes > self._settings.max_header_bytes:
            self._refuse(self._too_large())
        elif self._phase == _IDLE:
            if self._n_begun > n_begun or before != _IDLE:
                self._disarm()
                if self.cycle.response_complete and self.timeout_keep_alive_task is None:  # answered before its body
                    self.timeout_keep_alive_task = self.loop.call_later(
                        self.timeout_keep_alive, self.timeout_keep_alive_handler
                    )
            elif self._deadline is None and (self.cycle is None or self.cycle.response_complete):
                self._arm(self._settings.header_timeout_s)  # an empty line begins nothing, and ends no wait
        elif self._n_begun > n_begun or self._phase != before or self._deadline is None:
            self._arm(self._timeout_s())

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
        if self._n_headers > _MAX_HEADERS or self._n_header_bytes > self._settings.max_header_bytes:
            self._too_much = self._too_large()
            raise ValueError(self._too_much.message)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """What comes now is the body, unless the path is none."""
        super().on_headers_complete()
        self._phase = _BODY

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._phase = _IDLE
        self._n_head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or too much of it, in JSON."""
        self._refuse(self._too_much or Problem("bad_http", "The request is not valid HTTP/1.1."))

    def pause_writing(self) -> None:
        """The client does not keep up; an answer that it leaves would stay in memory as long as the connection."""
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        """The client has taken nearly all."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._expect_no_reader()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        self._close()

    def _close(self) -> None:
        """Close, and do not wait for ever until what was sent is taken."""
        if not self.transport.is_closing():
            self.transport.close()
            self._expect_reader()

    def _expect_reader(self) -> None:
        if self._untaken is None:
            seconds = self._settings.body_timeout_s + self.transport.get_write_buffer_size() / _BODY_BYTES_PER_S
            self._untaken = self.loop.call_later(seconds, self.transport.abort)

    def _expect_no_reader(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None

    def _timeout_s(self) -> float:
        if self._phase != _BODY:
            return self._settings.header_timeout_s
        announced = next((value for name, value in self.headers if name == b"content-length"), b"0")
        bound = min(int(announced) if announced.isdigit() else 0, self._settings.max_body_bytes)
        return self._settings.body_timeout_s + bound / _BODY_BYTES_PER_S

    def _too_large(self) -> Problem:
        return Problem(
            "header_fields_too_large",
            f"The headers are larger than {self._settings.max_header_bytes} bytes or more than {_MAX_HEADERS}.",
        )

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        if self.flow.read_paused:  # by this side, until those before are answered
            self._arm(self._timeout_s())
            return
        part = "body" if self._phase == _BODY else "headers"
        self._refuse(Problem("request_timeout", f"The request's {part} did not arrive in time."))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: object) -> None:
        """Answer a request whose turn has come."""
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        scope = cycle.scope
        begun = self.service.begin(scope["method"], scope["path"], scope["headers"])  # type: ignore[arg-type]
        # With more behind it, a reply would begin the next from within itself.
        if isinstance(begun, Response) and not (self.pipeline or self.flow.write_paused):
            self._reply(cycle, begun)
            return
        self._task = self.loop.create_task(self._serve(cycle, begun))
        self.tasks.add(self._task)
        self._task.add_done_callback(self.tasks.discard)

    async def _serve(self, cycle: RequestResponseCycle, begun: Request | Response) -> None:
        response = begun if isinstance(begun, Response) else await self.service.answer(begun, cycle.receive)
        if self.flow.write_paused:  # the client does not read what it has asked for
            await self.flow.drain()
        if response is None and not self.transport.is_closing():  # its time to end gracefully is over
            response = self.service.refuse(ClosedError("the grace is over"), cycle.scope["path"])
        if response is not None:
            self._reply(cycle, response)

    def _reply(self, cycle: RequestResponseCycle, response: Response) -> None:
        if cycle.disconnected or self.transport.is_closing():
            return
        cycle.keep_alive = cycle.keep_alive and not response.closes
        self._write(response, keep_alive=cycle.keep_alive, with_body=cycle.scope["method"] != "HEAD")
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        cycle.body = bytearray()  # of a refused request some may have come
        if not cycle.keep_alive:
            self._close()
        cycle.on_response()
        cycle.on_response = lambda: None  # or the two would hold each other

    def _write(self, response: Response, *, keep_alive: bool, with_body: bool = True) -> None:
        self.transport.write(b"".join([
            STATUS_LINE[response.status],
            *(b"%b: %b\r\n" % header for header in self.server_state.default_headers),
            response.head,
            b"\r\n" if keep_alive else b"connection: close\r\n\r\n",
            response.body if with_body else b"",
        ]))  # fmt: skip

    def on_response_complete(self) -> None:
        """Go on with the next request; behind the last one, refuse what was not one."""
        if self._last is not None and not self.pipeline:
            self._end()
        else:
            super().on_response_complete()

    def _refuse(self, problem: Problem) -> None:
        """Answer what cannot be read, when those before it are answered, and close the connection."""
        if self.transport.is_closing() or self._last is not None:
            return
        self._last = problem
        reading = self.cycle if self._phase == _BODY else None
        if reading is not None and reading.response_complete:
            self._close()  # it has its answer
        elif reading is not None and self.pipeline:
            self.pipeline.popleft()  # the newest stands left; its turn will not come
            self._wait_for_those_before()
        elif reading is None and self.cycle is not None and not self.cycle.response_complete:
            self._wait_for_those_before()
        else:
            self._end()

    def _wait_for_those_before(self) -> None:
        self._disarm()
        self.flow.pause_reading()

    def _end(self) -> None:
        """Say the last thing and close, unless the answer before has closed already."""
        if self._last is not None and not self.transport.is_closing():
            url = self.url.decode("ascii", "replace") if getattr(self, "url", b"") else ""
            self._write(self.service.refuse(self._last, url.partition("?")[0]), keep_alive=False)
            self._close()
