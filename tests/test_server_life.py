"""Failures, overload, slow clients, reload and the end: nothing is lost, nothing lies, and it recovers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.open_loop import Outcome, open_loop
from benchmarks.server_process import FAILING, Server, running, start, stop
from m3e import Encoder
from tests.failing_server import DIES, HANGS, NANS, RAISES, SLOW

if sys.platform != "linux":
    pytest.skip("processes are looked up in /proc", allow_module_level=True)

PLAIN = [f"今天天气真好 {i}" for i in range(40)]


@pytest.fixture(scope="module")
def failing(tiny_bundle: Path) -> Iterator[Server]:
    with running(tiny_bundle, command=FAILING) as server:
        yield server


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> dict[str, np.ndarray[Any, Any]]:
    return dict(zip(PLAIN, Encoder(tiny_bundle).encode(PLAIN, normalize_embeddings=True), strict=True))


def ask(server: Server, text: str) -> tuple[str, int, Any]:
    reply = server.post("/v1/embeddings", {"input": text}, timeout=60)
    assert b"NaN" not in reply.body
    assert b"null,null" not in reply.body
    return text, reply.status, reply.json


def poison_rounds(
    server: Server, expected: dict[str, np.ndarray[Any, Any]], failures: list[str], neighbours: int
) -> None:
    """Rounds of concurrent requests of one width, one of which fails; every neighbour must get its own vector."""
    with ThreadPoolExecutor(neighbours + 1) as pool:
        for failure in failures:
            texts = [*random.sample(PLAIN, neighbours), failure + "天天气真好 1"]
            random.shuffle(texts)
            for text, status, content in pool.map(lambda text: ask(server, text), texts):
                if text[0] == failure:
                    assert (status, content["error"]["code"]) == (500, "inference_failed"), content
                else:
                    assert status == 200, content
                    vector = np.array(content["data"][0]["embedding"], dtype=np.float32)
                    np.testing.assert_array_equal(vector, expected[text])


@pytest.mark.parametrize("failure", [RAISES, NANS, DIES, HANGS], ids=["raises", "gives NaN", "dies", "hangs"])
def test_neighbours_of_a_failing_text_are_right(
    failing: Server, expected: dict[str, np.ndarray[Any, Any]], failure: str
) -> None:
    poison_rounds(failing, expected, [failure] * (1 if failure in (DIES, HANGS) else 6), neighbours=12)
    failing.wait_until(True)


@pytest.mark.long
def test_neighbours_are_right_in_a_thousand_batches(failing: Server, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    failures = [RAISES] * 470 + [NANS] * 470 + [DIES] * 30 + [HANGS] * 30
    random.Random(0).shuffle(failures)
    poison_rounds(failing, expected, failures, neighbours=12)
    failing.wait_until(True)


def test_readiness_follows_the_worker_within_a_second_and_it_recovers(tiny_bundle: Path) -> None:
    with running(tiny_bundle, command=FAILING) as server:
        os.kill(server.worker_pid(), signal.SIGKILL)
        assert server.wait_until(False, 1) < 1
        assert server.get("/health/live").status == 200
        server.wait_until(True, 20)
        with ThreadPoolExecutor(1) as pool:
            hung = pool.submit(ask, server, HANGS)
            assert server.wait_until(False, 3) < 1
            assert hung.result()[1] == 500
        server.wait_until(True, 20)
        assert ask(server, PLAIN[0])[1] == 200


def test_a_client_that_leaves_does_not_have_its_texts_run(tiny_bundle: Path) -> None:
    with running(tiny_bundle, "--threads", "1", command=FAILING) as server:
        blocker = threading.Thread(target=ask, args=(server, SLOW))
        blocker.start()
        time.sleep(0.05)
        body = json.dumps({"inputs": "天气 天气 天气 天气 天气"}).encode()
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(
                    b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                    b"content-length: %d\r\n\r\n" % len(body) + body
                )
        blocker.join()
        time.sleep(0.3)
        metrics = server.get("/metrics").body.decode()
        assert "m3e_batch_texts_count 1.0" in metrics
        assert "m3e_active_requests 1.0" in metrics  # the one that asks
        assert "m3e_queue_tokens 0.0" in metrics


def test_a_full_queue_is_429_at_once_and_a_late_request_504(tiny_bundle: Path) -> None:
    with (
        running(
            tiny_bundle, "--threads", "1", "--max-queue-tokens", "30", "--request-timeout-s", "0.15", command=FAILING
        ) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        first = pool.submit(ask, server, SLOW)
        time.sleep(0.05)
        waiting = pool.submit(ask, server, PLAIN[0] * 4)
        time.sleep(0.02)
        started = time.perf_counter()
        reply = server.post("/v1/embeddings", {"input": "a"})
        assert time.perf_counter() - started < 0.1
        assert (reply.status, reply.json["error"]["code"]) == (429, "server_is_overloaded")
        assert int(reply.headers["retry-after"]) >= 1
        assert int(reply.headers["retry-after-ms"]) >= 1
        tei = server.post("/embed", {"inputs": "a"})
        assert (tei.status, tei.json) == (429, {"error": "Model is overloaded", "error_type": "Overloaded"})
        for late in (first, waiting):
            _, status, content = late.result()
            assert (status, content["error"]["code"]) == (504, "deadline_exceeded")


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


# The end


def drain_under_load(bundle: Path, rounds: int, connections: int, seconds: float) -> None:
    """Clients that keep their connections and go when told to; a request that was sent on one must be answered."""
    for _ in range(rounds):
        server = start(bundle, "--drain-delay-s", "0.3")
        stop_at = time.monotonic() + seconds
        outcomes: Counter[str] = Counter()
        codes: list[int] = []
        ended = threading.Event()

        async def client(
            server: Server = server, outcomes: Counter[str] = outcomes, ended: threading.Event = ended
        ) -> None:
            body = json.dumps({"inputs": "今天天气真好"}).encode()
            head = b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            while not ended.is_set():
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                except OSError:
                    outcomes["refused"] += 1
                    return
                keep, first = True, True
                while keep and not ended.is_set():
                    try:
                        writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
                        answer = await reader.readuntil(b"\r\n\r\n")
                        length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                        await reader.readexactly(length)
                    except (OSError, asyncio.IncompleteReadError):
                        # A new connection that only the kernel had taken was never the server's.
                        outcomes["refused" if first else "lost"] += 1
                        break
                    first = False
                    outcomes[answer[9:12].decode()] += 1
                    keep = b"connection: close" not in answer.lower()
                writer.close()

        async def clients(client: Any = client) -> None:
            await asyncio.gather(*(client() for _ in range(connections)))

        thread = threading.Thread(target=asyncio.run, args=(clients(),))
        thread.start()
        time.sleep(max(0.0, stop_at - time.monotonic()))
        codes.append(stop(server))
        ended.set()
        thread.join()
        assert codes == [0]
        assert outcomes["lost"] == 0, outcomes
        assert outcomes["200"] > connections
        assert set(outcomes) <= {"200", "503", "refused", "lost"}


def test_no_accepted_request_fails_when_the_server_is_told_to_end(tiny_bundle: Path) -> None:
    drain_under_load(tiny_bundle, rounds=1, connections=16, seconds=0.8)


@pytest.mark.long
def test_no_accepted_request_fails_in_fifty_ends(tiny_bundle: Path) -> None:
    drain_under_load(tiny_bundle, rounds=50, connections=32, seconds=1.0)


def test_readiness_goes_before_the_service(tiny_bundle: Path) -> None:
    server = start(tiny_bundle, "--drain-delay-s", "0.5")
    try:
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_until(False, 1) < 0.2
        reply = server.post("/embed", {"inputs": "a"})
        assert (reply.status, reply.headers["connection"]) == (200, "close")
    finally:
        assert stop(server) == 0


# Reload


def test_a_bundle_is_swapped_while_requests_run_and_a_damaged_one_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    shutil.copytree(tiny_bundle, folder)
    with running(folder) as server, ThreadPoolExecutor(4) as pool:
        done = threading.Event()

        def load() -> set[int]:
            statuses = set()
            while not done.is_set():
                statuses.add(ask(server, random.choice(PLAIN))[1])
            return statuses

        loads = [pool.submit(load) for _ in range(3)]
        first = server.worker_pid()
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: b'm3e_reloads_total{result="swapped"} 1.0' in server.get("/metrics").body)
        with (folder / "tokenizer.json").open("r+b") as file:
            file.write(b" ")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: b'm3e_reloads_total{result="refused"} 1.0' in server.get("/metrics").body)
        assert server.worker_pid() != first
        done.set()
        assert {status for item in loads for status in item.result()} == {200}
        assert server.ready()


def wait_for(condition: Any, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


# Slow clients


def dribble(port: int, ended: threading.Event, cut: list[float], body: bool) -> None:
    """Send a byte now and then until the server has had enough."""
    head = b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    started = time.monotonic()
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head if body else b"P")
        connection.settimeout(0.05)
        while not ended.is_set():
            try:
                if not connection.recv(1000):
                    break
            except TimeoutError:
                connection.sendall(b" " if body else b"O")
    cut.append(time.monotonic() - started)


@pytest.mark.parametrize("body", [False, True], ids=["headers", "body"])
def test_dribbling_connections_are_cut_at_an_absolute_deadline(tiny_bundle: Path, body: bool) -> None:
    with running(tiny_bundle, "--header-timeout-s", "0.5", "--body-timeout-s", "0.5") as server:
        ended, cut = threading.Event(), list[float]()
        threads = [threading.Thread(target=dribble, args=(server.port, ended, cut, body)) for _ in range(20)]
        for thread in threads:
            thread.start()
        assert all(ask(server, text)[1] == 200 for text in PLAIN[:20])
        for thread in threads:
            thread.join(10)
        ended.set()
        assert len(cut) == 20
        assert max(cut) < 2.0


@pytest.mark.long
def test_two_hundred_dribbling_connections_do_not_move_the_others(tiny_bundle: Path) -> None:
    with running(tiny_bundle) as server:

        def p99(n: int = 3000) -> float:
            times = []
            for i in range(n):
                started = time.perf_counter()
                assert ask(server, PLAIN[i % 40])[1] == 200
                times.append(time.perf_counter() - started)
            return statistics.quantiles(times, n=100)[98]

        p99(500)
        before = p99()
        ended, cut = threading.Event(), list[float]()
        threads = [threading.Thread(target=dribble, args=(server.port, ended, cut, i % 2 == 0)) for i in range(200)]
        for thread in threads:
            thread.start()
        during = p99()
        ended.set()
        for thread in threads:
            thread.join(20)
        assert during <= 1.1 * before, (before, during)


# Load that does not wait for answers


def test_overload_loses_nothing_and_refuses_quickly(tiny_bundle: Path) -> None:
    """The shape of the long test in two seconds: with a slow model, far more than it can do."""
    with running(tiny_bundle, "--threads", "1", "--max-queue-ms", "50", command=FAILING) as server:
        texts = [SLOW] * 5 + PLAIN
        outcomes = open_loop(server.port, texts, rate_per_s=300, seconds=2)
        assert_ledger(outcomes, 600)


@pytest.mark.long
def test_twice_the_capacity_for_a_minute(tiny_bundle: Path) -> None:
    from benchmarks.serving import overload

    bundle = os.environ.get("M3E_SERVING_BUNDLE", str(tiny_bundle))
    record = overload(bundle, seconds=60)
    assert record["lost"] == 0
    assert record["goodput_of_capacity"] >= 0.95
    assert record["p99_accepted_ms"] <= 3 * record["p99_at_0.8_ms"]
    assert record["p99_refusal_ms"] <= 10


def assert_ledger(outcomes: list[Outcome], n: int) -> None:
    assert len(outcomes) == n
    statuses = Counter(outcome.status for outcome in outcomes)
    assert set(statuses) <= {200, 429}, statuses
    assert statuses[200] > 0


# Memory


def churn(server: Server, n: int, seed: int) -> None:
    """Requests of random length over a few connections."""
    rng = random.Random(seed)
    texts = ["天" * rng.randint(1, 510) if rng.random() < 0.05 else "天" * rng.randint(1, 30) for _ in range(2000)]

    async def client(share: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for i in range(share):
            body = json.dumps({"inputs": texts[(i * 7919 + share) % 2000]}).encode()
            writer.write(
                b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n" % len(body) + body
            )
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer[9:12] == b"200", answer
            await reader.readexactly(int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        writer.close()

    async def clients() -> None:
        await asyncio.gather(*(client(n // 8) for _ in range(8)))

    asyncio.run(clients())


@pytest.mark.parametrize(
    ("first", "more"),
    [pytest.param(1500, 1500, id="3k"), pytest.param(20_000, 180_000, id="200k", marks=pytest.mark.long)],
)
def test_memory_after_many_requests(tiny_bundle: Path, first: int, more: int) -> None:
    with running(tiny_bundle) as server:
        churn(server, first, 0)
        before = server.resident_kb()
        churn(server, more, 1)
        assert server.resident_kb() - before <= 8_000
