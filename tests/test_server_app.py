"""The service without a socket: the gate, bundles that are swapped, and what a refusal leaves behind."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from uvicorn.server import ServerState

from m3e import ClosedError, OverloadedError
from m3e.server.app import App
from m3e.server.gate import Gate, State
from m3e.server.models import Models
from m3e.server.problems import Problem
from m3e.server.requests import Answer, Request, Response
from m3e.server.run import _config
from m3e.server.settings import Settings


def open_none(name: str, folder: str) -> Any:
    raise AssertionError(f"{name} is not to be opened")


async def answered(app: App, method: str, path: str) -> int:
    """The status of an answer to an empty object."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    begun = app.begin(method, path, [(b"host", b"localhost"), (b"content-type", b"application/json")])
    response = begun if isinstance(begun, Response) else await app.answer(begun, receive)
    assert response is not None
    return response.status


@pytest.mark.parametrize(("swaps", "status"), [(1, 200), (2, 503)])
def test_a_request_whose_bundle_is_swapped_is_answered_by_the_next(swaps: int, status: int) -> None:
    left = iter(range(swaps))

    async def handler(request: Request) -> Answer:
        if next(left, None) is not None:
            raise ClosedError("the inference process was ended")
        return Answer(request.body)

    app = App(Settings(bundles=("b",)), Models(open_none, ("b",), 1.0), [])
    app.routes["/embed"]["POST"] = handler
    assert asyncio.run(answered(app, "POST", "/embed")) == status


@pytest.mark.parametrize("overloaded", [False, True])
@pytest.mark.parametrize(("method", "path"), [("POST", "/embed"), ("POST", "/v1/nowhere"), ("GET", "/health/ready")])
def test_a_refusal_leaves_nothing_for_the_collector(
    method: str, path: str, overloaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overloaded:
        monkeypatch.setattr(Models, "overload", lambda self: OverloadedError("full", retry_after_s=1.0))

    async def garbage() -> int:
        for _ in range(3):
            assert await answered(app, method, path) >= 400
        gc.collect()
        for _ in range(100):
            await answered(app, method, path)
        return gc.collect()

    app = App(Settings(bundles=("b",)), Models(open_none, ("b",), 1.0), [])
    gc.disable()
    try:
        assert asyncio.run(garbage()) < 100
    finally:
        gc.enable()


def test_a_mistake_of_the_service_is_no_mistake_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(Settings(bundles=("b",)), Models(open_none, ("b",), 1.0), [])
    monkeypatch.setattr(app.gate, "check_host", lambda headers: 1 / 0)
    assert asyncio.run(answered(app, "POST", "/embed")) == 500
    assert app.metrics.problems["internal_error"] == 1


class Outgoing(asyncio.Transport):
    """A transport whose peer reads nothing, so that what is written after its end would still be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closing = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def write(self, data: Any) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        pass


def test_nothing_is_said_behind_the_answer_that_ends_a_connection() -> None:
    async def talk() -> list[bytes]:
        app = App(Settings(bundles=("b",)), Models(open_none, ("b",), 1.0), [])
        app.state.draining = True
        config = _config(app.settings, app)
        config.load()
        protocol: Any = config.http_protocol_class
        connection, outgoing = protocol(config, ServerState(), {}), Outgoing()
        connection.connection_made(outgoing)
        connection.data_received(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\nNOT HTTP\r\n\r\n")
        await asyncio.sleep(0.1)
        connection.connection_lost(None)
        return outgoing.written

    (answer,) = asyncio.run(talk())
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_the_gate_lets_no_text_in_once_the_service_ends() -> None:
    state = State()
    gate = Gate(
        Settings(bundles=("b",)), Models(open_none, ("b",), 1.0), [], state, {"/embed": ("POST",), "/health": ("GET",)}
    )
    assert gate.check("POST", "/embed", "/embed", []) == "POST"
    state.refusing = True
    with pytest.raises(Problem) as refused:
        gate.check("POST", "/embed", "/embed", [])
    assert refused.value.code == "shutting_down"
    assert gate.check("HEAD", "/health", "/health", []) == "GET"
