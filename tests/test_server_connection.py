"""What a connection may carry, and for how long: broken, pipelined, early and late messages on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.server_process import FAILING, running
from tests import wire
from tests.failing_server import SLOW

# The deadlines of bodies without the seconds that their bytes are given.
NO_TIME_FOR_BYTES = (
    sys.executable, "-c",
    "from m3e.server import http; http._BODY_BYTES_PER_S = 1 << 40; from m3e.cli.main import main; main()", "serve",
)  # fmt: skip
# And where nothing pauses: what is left when a connection is closed may be less than what pauses it.
NEVER_PAUSED = (
    sys.executable, "-c", """
from m3e.cli.main import main
from m3e.server import http

def connection_made(self, transport, made=http.Protocol.connection_made):
    made(self, transport)
    transport.set_write_buffer_limits(high=1 << 30)

http._BODY_BYTES_PER_S, http.Protocol.connection_made = 1 << 40, connection_made
main()
""", "serve",
)  # fmt: skip
GOOD = wire.embed("你好")
NOWHERE = wire.embed("x").replace(b"/embed", b"/nowhere")
LAST = GOOD.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")


async def statuses(port: int, *messages: bytes | float) -> list[int]:
    """What a connection says until it is closed; a number among the messages is a pause in seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for message in messages:
        if isinstance(message, bytes):
            writer.write(message)
        else:
            await asyncio.sleep(message)
    found = []
    while True:
        try:
            found.append((await asyncio.wait_for(wire.read_answer(reader), 20)).status)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            writer.close()
            return found


def test_java_asks_for_http_2_and_gets_its_vectors(tiny_bundle: Path) -> None:
    """The JDK's HttpClient offers h2c on every first request; the parser would drop the body."""
    body = b'{"inputs": "a"}'
    with running(tiny_bundle) as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for name in (b"Upgrade", b"UPGRADE"):
            connection.sendall(
                b"POST /embed HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAA\r\n"
                + name
                + b": h2c\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            assert connection.recv(1 << 20).startswith(b"HTTP/1.1 200 ")


def test_an_empty_line_does_not_stop_the_clock(tiny_bundle: Path) -> None:
    with running(tiny_bundle, "--header-timeout-s", "0.5") as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(b"\r\n")
            assert b" 408 " in connection.recv(1 << 16)
        message = (
            b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
            b'{"inputs": "a"}'
        )
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            for _ in range(2):
                connection.sendall(message)
                assert connection.recv(1 << 20).startswith(b"HTTP/1.1 200 ")
            connection.sendall(b"\r\n")
            assert b" 408 " in connection.recv(1 << 16)


def test_an_answer_that_nobody_takes_ends_the_connection(tiny_bundle: Path) -> None:
    """An answer of more than the kernel holds for a client; one that reads slowly, but reads, gets all of it."""
    texts = ["天"] * 20_000
    request = wire.embed(texts)
    bounds = ("--body-timeout-s", "1", "--max-client-batch-size", len(texts))
    with running(tiny_bundle, *bounds, command=NO_TIME_FOR_BYTES) as server:
        expected = len(server.post("/embed", {"inputs": texts}).body)
        assert expected > 8 << 20
        for message in (request, request.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1)):
            assert take(server.port, message, wait_s=2) < expected < take(server.port, message, wait_s=0)
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(request)
            wait_for_an_answer(connection)
            time.sleep(0.5)  # more than the kernel holds is left
            while expected > 0:
                expected -= len(connection.recv(1 << 20))
            time.sleep(1.5)  # it is taken, so no clock runs any more
            connection.sendall(LAST)
            assert b"HTTP/1.1 200 " in b"".join(iter(partial(connection.recv, 1 << 16), b""))


def test_closing_does_not_wait_for_ever_until_an_answer_is_taken(tiny_bundle: Path) -> None:
    texts = ["天"] * 20_000
    request = wire.embed(texts)
    bounds = ("--body-timeout-s", "1", "--keep-alive-s", "1", "--max-client-batch-size", len(texts))
    with running(tiny_bundle, *bounds, command=NEVER_PAUSED) as server:
        expected = len(server.post("/embed", {"inputs": texts}).body)
        closing = request.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1)
        assert take(server.port, closing, wait_s=3) < expected < take(server.port, closing, wait_s=0.5)
        assert take(server.port, request, wait_s=4) < expected < take(server.port, request, wait_s=0.5)


def take(port: int, message: bytes, wait_s: float) -> int:
    """How many bytes of an answer come to a client that waits so long, once it is there, before it takes them."""
    n = 0
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(message)
        wait_for_an_answer(connection)
        time.sleep(wait_s)
        connection.settimeout(1)
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            while data := connection.recv(1 << 20):
                n += len(data)
                time.sleep(0.01)
    return n


def wait_for_an_answer(connection: socket.socket) -> None:
    """Wait until its first bytes have come, and take none."""
    assert connection.recv(1, socket.MSG_PEEK)


def test_a_broken_request_is_refused_behind_the_answers_to_those_before(tiny_bundle: Path) -> None:
    broken = (
        b"NOT HTTP\r\n\r\n",
        b"POST /embed HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nX",
        b"GET http://h HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"CONNECT h:443 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    )
    with running(tiny_bundle) as server:
        for bad in broken:
            assert asyncio.run(statuses(server.port, bad)) == [400]
            assert asyncio.run(statuses(server.port, GOOD + bad)) == [200, 400]
            assert asyncio.run(statuses(server.port, GOOD, 0.2, bad)) == [200, 400]
            assert asyncio.run(statuses(server.port, GOOD + GOOD + bad)) == [200, 200, 400]
        counted = server.metrics()
        assert counted["m3e_problems_total[('code', 'bad_http')]"] == 16
        assert counted["m3e_requests_total[('route', '/embed'), ('status', '2xx')]"] == 16
        many = asyncio.run(statuses(server.port, GOOD + NOWHERE * 2000 + broken[0]))
        assert many == [200, *[404] * 2000, 400]


def test_a_body_that_breaks_behind_its_answer_gets_no_other(tiny_bundle: Path) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    with running(tiny_bundle) as server:
        assert asyncio.run(statuses(server.port, head, 0.3, b"X\r\n")) == [404]


def test_nothing_is_answered_behind_a_refusal_that_closes(tiny_bundle: Path) -> None:
    two_hosts = NOWHERE.replace(b"host: ", b"host: a\r\nhost: ")
    # An answer of 20 MB that is not read, so that the next one has to wait.
    large = wire.embed(["天" * 600] * 400).replace(b"/embed", b"/tokenize")
    with running(tiny_bundle, "--body-timeout-s", "1") as server:
        assert asyncio.run(statuses(server.port, two_hosts + NOWHERE * 100)) == [400]
        assert server.metrics()["m3e_problems_total[('code', 'not_found')]"] == 0
        assert asyncio.run(statuses(server.port, large, 5, NOWHERE[:-5], 3)) == [200, 408]


def test_the_clock_runs_for_one_request_at_a_time(tiny_bundle: Path) -> None:
    """Not while an answer is awaited, and not on from the request before."""
    slow = wire.embed([SLOW] * 4)
    with running(tiny_bundle, "--body-timeout-s", "0.2", "--max-batch-tokens", "1", command=FAILING) as server:
        assert asyncio.run(statuses(server.port, slow + LAST[:-5], 0.1, LAST[-5:])) == [200, 200]
    with running(tiny_bundle, "--body-timeout-s", "1", "--keep-alive-s", "1") as server:
        assert asyncio.run(statuses(server.port, GOOD[:-5], 0.7, GOOD[-5:] + LAST[:-5], 0.7, LAST[-5:])) == [200, 200]
    with running(tiny_bundle, "--body-timeout-s", "9", "--keep-alive-s", "1") as server:
        assert asyncio.run(statuses(server.port, NOWHERE + LAST[:-5], 2, LAST[-5:])) == [404, 200]


def test_a_request_that_outlasts_the_grace_is_told_so(tiny_bundle: Path) -> None:
    bounds = ("--grace-s", "0.3", "--drain-delay-s", "0", "--max-batch-tokens", "1")
    with running(tiny_bundle, *bounds, command=FAILING) as server:

        async def outlast() -> list[int]:
            asking = asyncio.create_task(statuses(server.port, wire.embed([SLOW] * 40)))
            await asyncio.sleep(0.3)
            server.process.terminate()
            return await asking

        assert asyncio.run(outlast()) == [503]


def test_a_connection_answered_before_its_body_is_kept_no_longer_than_others(tiny_bundle: Path) -> None:
    message = wire.embed("你好").replace(b"/embed", b"/nowhere")
    with running(tiny_bundle, "--keep-alive-s", "1") as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(message[:-10])
            assert b" 404 " in connection.recv(1 << 16)
            connection.sendall(message[-10:])
            assert connection.recv(1) == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            for _ in range(2):
                connection.sendall(message)
                assert b" 404 " in connection.recv(1 << 16)


def test_the_vectors_of_tokens_are_bounded_and_in_time(token_bundle: Path) -> None:
    with running(token_bundle) as server:
        many = server.post("/embed_all", {"inputs": ["天" * 600] * 520})
        assert (many.status, many.json["error_type"]) == (422, "Validation")
        assert "/embed_all gives" in many.json["error"]
    with running(token_bundle, "--request-timeout-s", "0.2") as server:
        slow = server.post("/embed_all", {"inputs": ["天" * 600] * 400})
        assert (slow.status, slow.json["error_type"]) == (424, "Backend")
        assert server.post("/embed_all", {"inputs": "天"}).status == 200


def test_an_answer_to_head_has_no_body(tiny_bundle: Path) -> None:
    question = b" /info HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with running(tiny_bundle) as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            b"HEAD" + question + b"GET" + question.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        )
        received = b""
        while part := connection.recv(1 << 16):
            received += part
        head, _, rest = received.partition(b"\r\n\r\n")
        assert rest.startswith(b"HTTP/1.1 200 ")
        assert b"content-length: %d\r\n" % len(rest.partition(b"\r\n\r\n")[2]) in head


def test_answers_wait_for_a_client_that_does_not_read(tiny_bundle: Path) -> None:
    n, message = 200, wire.embed(["天"] * 100)

    async def talk(port: int, n_answered: Callable[[], float]) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(message * n)
        before = -1.0
        while (now := await asyncio.to_thread(n_answered)) != before:
            before = now
            await asyncio.sleep(1)
        for _ in range(n):
            assert (await wire.read_answer(reader)).status == 200
        writer.close()
        return before

    with running(tiny_bundle) as server:
        stalled_at = asyncio.run(
            talk(server.port, lambda: server.metrics()["m3e_requests_total[('route', '/embed'), ('status', '2xx')]"])
        )
        assert 0 < stalled_at < n / 2
