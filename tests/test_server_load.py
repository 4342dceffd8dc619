"""Crowds, clients that leave, slow senders and many requests: none of them costs the others more than it has to."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.open_loop import Outcome, open_loop
from benchmarks.server_process import FAILING, Server, running
from tests import wire
from tests.asking import PLAIN, ask, wait_for
from tests.failing_server import SLOW

if sys.platform != "linux":
    pytest.skip("processes are looked up in /proc", allow_module_level=True)

# Clients that leave


def run_for_leavers(server: Server, leavers: int, blockers: int = 5) -> int | None:
    """Texts that were run of clients that had left before their turn came.

    The only thread of the worker is kept busy by texts of widths of their own, and whoever leaves has a text of another
    width, so nobody shares a batch.

    Returns:
        None if the machine was too slow for the clients to leave before their turn.
    """
    before = server.metrics()

    def since(name: str, now: dict[str, float]) -> int:
        return int(now[name] - before[name])

    def all_left(now: dict[str, float]) -> bool:
        waiting = blockers - since("m3e_requests_total[('route', '/v1/embeddings'), ('status', '2xx')]", now)
        return now["m3e_active_requests"] == waiting + 1  # the one that asks

    with ThreadPoolExecutor(blockers) as pool:
        for i in range(blockers):
            pool.submit(ask, server, SLOW + "天" * 4 * i)
        wait_for(lambda: server.metrics()["m3e_queue_requests"] == blockers - 1)
        for _ in range(leavers):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(wire.embed("天气" * 25))
        while not all_left(seen := server.metrics()):
            time.sleep(0.005)
    after = server.metrics()
    assert after["m3e_active_requests"] == 1
    assert after["m3e_queue_tokens"] == 0
    in_time = since("m3e_batch_texts_sum", seen) < blockers
    return since("m3e_batch_texts_sum", after) - blockers if in_time else None


@pytest.mark.parametrize("clients", [pytest.param(20, id="few"), pytest.param(1000, id="many", marks=pytest.mark.long)])
def test_the_texts_of_clients_that_leave_are_not_run(
    clients: int, tiny_bundle: Path, cases: Callable[[int], int], record_property: Callable[[str, str], None]
) -> None:
    n, at_once = cases(clients), 20
    with running(tiny_bundle, "--threads", "1", command=FAILING) as server:
        rounds: list[int] = []
        for _ in range(3 * n // at_once + 10):
            n_run = run_for_leavers(server, at_once)
            if n_run is not None:
                rounds.append(n_run)
            if len(rounds) == n // at_once:
                break
        else:
            pytest.fail(f"only in {len(rounds)} of {n // at_once} rounds had the clients left before their turn")
    record_property("C7", f"{sum(rounds)} of {len(rounds) * at_once:,}")
    assert sum(rounds) == 0


# Crowds


def test_a_full_queue_is_429_at_once_and_a_late_request_504(tiny_bundle: Path) -> None:
    bounds = ("--max-batch-tokens", "1", "--max-queue-tokens", "30", "--request-timeout-s", "1.5")
    with (
        running(tiny_bundle, "--threads", "1", *bounds, command=FAILING) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        # Ten batches of 0.2 s: more than the queue's bound, but let into it because it is empty.
        large = pool.submit(server.post, "/v1/embeddings", {"input": [SLOW + "天" * 4] * 10})
        wait_for(lambda: server.metrics()["m3e_queue_tokens"] >= 30)
        reply = server.post("/v1/embeddings", {"input": "a"})
        tei = server.post("/embed", {"inputs": "a"})
        assert not large.done()
        assert (reply.status, reply.json["error"]["code"]) == (429, "server_is_overloaded")
        assert int(reply.headers["retry-after"]) >= 1
        assert int(reply.headers["retry-after-ms"]) >= 1
        assert (tei.status, tei.json) == (429, {"error": "Model is overloaded", "error_type": "Overloaded"})
        late = large.result()
        assert (late.status, late.json["error"]["code"]) == (504, "deadline_exceeded")


def test_an_overloaded_server_refuses_before_the_body_has_come(tiny_bundle: Path) -> None:
    with running(tiny_bundle, "--threads", "1", "--max-queue-ms", "0.001", command=FAILING) as server:
        assert ask(server, PLAIN[0])[1] == 200
        ended = threading.Event()
        statuses: set[int] = set()

        def flood() -> None:
            while not ended.is_set():
                statuses.add(ask(server, SLOW)[1])

        def refused_without_body() -> bool:
            with socket.create_connection(("127.0.0.1", server.port), timeout=1) as bare:
                bare.sendall(
                    b"POST /embed HTTP/1.1\r\nhost: localhost\r\n"
                    b"content-type: application/json\r\ncontent-length: 9\r\n\r\n"
                )
                with contextlib.suppress(TimeoutError):  # let in: it waits for the body
                    return bare.recv(1 << 16).startswith(b"HTTP/1.1 429 ")
            return False

        with ThreadPoolExecutor(100) as pool:
            for _ in range(100):
                pool.submit(flood)
            try:
                wait_for(refused_without_body)
            finally:
                ended.set()
        assert statuses <= {200, 429}


# Load that does not wait for answers


def test_overload_loses_nothing_and_refuses_quickly(tiny_bundle: Path) -> None:
    """The shape of the long test in two seconds: with a slow model, far more than it can do."""
    with running(tiny_bundle, "--threads", "1", "--max-queue-ms", "50", command=FAILING) as server:
        texts = [SLOW] * 5 + PLAIN
        outcomes = open_loop(server.port, texts, rate_per_s=300, seconds=2)
        assert_ledger(outcomes, 600)


def assert_ledger(outcomes: list[Outcome], n: int) -> None:
    assert len(outcomes) == n
    statuses = Counter(outcome.status for outcome in outcomes)
    assert set(statuses) <= {200, 429}, statuses
    assert statuses[200] > 0


# Slow clients


def dribble_all(port: int, bodies: Sequence[bool], every_s: float) -> list[float]:
    """Send a byte now and then, within the body or the headers, until the server has had enough.

    One thread for all connections, a few at a time: they are to cost the server something, not the machine.

    Args:
        port: Of the server.
        bodies: For each connection whether it dribbles in the body.
        every_s: Seconds between two bytes of a connection.

    Returns:
        The seconds after which each was cut; after a minute all that are left.
    """
    head = b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n"
    live = deque[tuple[socket.socket, bool, float]]()
    for body in bodies:
        live.append((socket.create_connection(("127.0.0.1", port), timeout=30), body, time.monotonic()))
        live[-1][0].sendall(head + (b"\r\n" if body else b"x-slow: "))
        live[-1][0].setblocking(False)
    cut: list[float] = []
    pause_s = every_s / max(1, len(live) // 10)  # the last ones are asked sooner: their end is to be seen when it comes
    while live:
        time.sleep(pause_s)
        for _ in range(min(len(live), 10)):
            connection, body, started = live.popleft()
            if dribbles_on(connection, b" " if body else b"x") and time.monotonic() - started < 60:
                live.append((connection, body, started))
            else:
                connection.close()
                cut.append(time.monotonic() - started)
    return cut


def dribbles_on(connection: socket.socket, byte: bytes) -> bool:
    """Send a byte where there is nothing to read: whether the connection still lives."""
    try:
        with contextlib.suppress(BlockingIOError):
            return bool(connection.recv(1000))
        connection.send(byte)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("body", [False, True], ids=["headers", "body"])
def test_dribbling_connections_are_cut_at_an_absolute_deadline(tiny_bundle: Path, body: bool) -> None:
    with running(tiny_bundle, "--header-timeout-s", "0.5", "--body-timeout-s", "0.5") as server:
        with ThreadPoolExecutor(1) as pool:
            dribblers = pool.submit(dribble_all, server.port, [body] * 20, every_s=0.05)
            assert all(ask(server, text)[1] == 200 for text in PLAIN[:20])
            cut = dribblers.result()
        assert len(cut) == 20
        assert 0.5 <= min(cut) <= max(cut) < 2.0


@pytest.mark.long
def test_five_hundred_dribbling_connections_do_not_move_the_others(
    tiny_bundle: Path, record_property: Callable[[str, str], None]
) -> None:
    """Load at an even rate, alone and beside them, in turn; they send from a process of their own, as they would.

    Each sends two bytes a second, twenty times as often as slowhttptest by default (its option ``-i``). The p99 of one
    turn says little, so there are many.
    """
    limit_s, seconds, n, rounds = 8, 5, 500, 16
    arguments = ("--header-timeout-s", limit_s, "--body-timeout-s", limit_s)
    alone, beside, cut = [], [], list[float]()
    with running(tiny_bundle, *arguments) as server, ProcessPoolExecutor(1) as pool:

        def p99_ms(seconds: float) -> float:
            outcomes = open_loop(server.port, PLAIN, rate_per_s=300, seconds=seconds)
            assert {outcome.status for outcome in outcomes} == {200}
            return float(np.percentile([outcome.seconds for outcome in outcomes], 99)) * 1000

        p99_ms(2)
        for _ in range(rounds):
            alone.append(p99_ms(seconds))
            dribblers = pool.submit(dribble_all, server.port, [False, True] * (n // 2), every_s=0.5)
            wait_for(lambda: server.metrics()["m3e_active_requests"] > n // 2)  # those that send bodies
            beside.append(p99_ms(seconds))
            assert not dribblers.done()
            cut += dribblers.result()
    growth = statistics.median(beside) / statistics.median(alone) - 1
    n_cut = sum(limit_s <= seconds < limit_s + 2 for seconds in cut)
    record_property("C13", f"{growth:+.0%} ({statistics.median(alone):.1f} to {statistics.median(beside):.1f} ms); "
                    f"{n_cut} of {rounds * n} cut by the deadline")  # fmt: skip
    assert growth <= 0.1
    assert n_cut == rounds * n


# Memory


def churn(server: Server, n: int, seed: int) -> None:
    """Requests of random length over a few connections."""
    rng = random.Random(seed)
    texts = ["天" * rng.randint(1, 510) if rng.random() < 0.05 else "天" * rng.randint(1, 30) for _ in range(2000)]

    async def client(share: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for i in range(share):
            writer.write(wire.embed(texts[(i * 7919 + share) % 2000]))
            assert (await wire.read_answer(reader)).status == 200
        writer.close()

    async def clients() -> None:
        await asyncio.gather(*(client(n // 8) for _ in range(8)))

    asyncio.run(clients())


@pytest.mark.parametrize(
    ("first", "more"),
    [pytest.param(1500, 1500, id="few"), pytest.param(20_000, 200_000, id="many", marks=pytest.mark.long)],
)
def test_memory_after_many_requests(
    first: int, more: int, tiny_bundle: Path, cases: Callable[[int], int], record_property: Callable[[str, str], None]
) -> None:
    n = cases(more)
    with running(tiny_bundle) as server:
        churn(server, first, 0)
        before = server.resident_kb()
        churn(server, n, 1)
        grown_kb = server.resident_kb() - before
    record_property("D1", f"{grown_kb / 1024:+.1f} MB over {n:,}")
    assert grown_kb <= 8 << 10


def test_bodies_that_are_too_many_together_are_429_and_one_alone_is_taken(tiny_bundle: Path) -> None:
    with running(tiny_bundle, "--max-held-bytes", "1000") as server:
        large = wire.embed("天" * 600)
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(large[:900])
            wait_for(lambda: server.metrics()["m3e_active_requests"] == 2)
            refused = server.post("/embed", {"inputs": "天" * 300})
            assert (refused.status, refused.json["error_type"]) == (429, "Overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            assert server.post("/embed", {"inputs": "天"}).status == 200  # there is room for that
            connection.sendall(large[900:])
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        wait_for(lambda: server.metrics()["m3e_active_requests"] == 1)
        assert server.post("/embed", {"inputs": "天" * 300}).status == 200
        assert server.post("/embed", {"inputs": "天" * 600}).status == 200
