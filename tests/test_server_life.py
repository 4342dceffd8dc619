"""Failures, the end and reload: nothing is lost, nothing lies, and it recovers."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.checkpoints import write_checkpoint
from benchmarks.server_process import FAILING, Server, running, start, stop
from m3e import Encoder
from m3e.bundle import Bundle
from m3e.errors import ClosedError, StartError
from m3e.server.worker import Worker
from m3e_export.pipeline import convert
from tests import wire
from tests.asking import PLAIN, ask, wait_for
from tests.failing_server import DIES, HANGS, NANS, RAISES, SLOW

if sys.platform != "linux":
    pytest.skip("processes are looked up in /proc", allow_module_level=True)

Vectors = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def failing(tiny_bundle: Path) -> Iterator[Server]:
    with running(tiny_bundle, command=FAILING) as server:
        yield server


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> Vectors:
    return vectors_of(tiny_bundle)


def vectors_of(bundle: Path) -> Vectors:
    return dict(zip(PLAIN, Encoder(bundle).encode(PLAIN, normalize_embeddings=True), strict=True))


def poison_rounds(server: Server, expected: Vectors, failures: list[str], neighbours: int) -> None:
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
def test_neighbours_of_a_failing_text_are_right(failing: Server, expected: Vectors, failure: str) -> None:
    poison_rounds(failing, expected, [failure] * (1 if failure in (DIES, HANGS) else 6), neighbours=12)
    failing.wait_until(True)


@pytest.mark.long
def test_neighbours_are_right_in_a_thousand_batches(
    failing: Server, expected: Vectors, cases: Callable[[int], int], record_property: Callable[[str, str], None]
) -> None:
    n, neighbours = cases(1000), 12
    failures = random.Random(0).choices([RAISES, NANS, DIES, HANGS], [47, 47, 3, 3], k=n)
    poison_rounds(failing, expected, failures, neighbours)
    failing.wait_until(True)
    record_property("A6", f"100 % in {n:,} rounds of {neighbours} neighbours")
    record_property("A8", f"0 of {n * (neighbours + 1):,} answers, {failures.count(NANS):,} of them to what gave NaN")


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


def test_a_call_that_hangs_is_ended_while_no_thread_is_idle(tiny_bundle: Path) -> None:
    with running(tiny_bundle, "--threads", "1", command=FAILING) as server:
        assert ask(server, HANGS)[1] == 500  # 504 would be the end of the request's own time
        server.wait_until(True, 20)
        assert ask(server, PLAIN[0])[1] == 200


@pytest.mark.long
def test_what_a_lost_worker_costs(
    tiny_bundle: Path, cases: Callable[[int], int], record_property: Callable[[str, str], None]
) -> None:
    """Killed with a batch in it, or hung: seconds until it is not ready, the batch is answered, and it is ready."""
    n, costs = cases(6), []
    with running(tiny_bundle, command=FAILING) as server, ThreadPoolExecutor(1) as pool:
        for i in range(n):
            hangs = i % 2 == 1
            started = time.monotonic()
            pending = pool.submit(ask, server, HANGS if hangs else SLOW)
            if not hangs:
                time.sleep(0.1)  # half of what the batch takes
                started = time.monotonic()
                os.kill(server.worker_pid(), signal.SIGKILL)
            server.wait_until(False)
            not_ready_s = time.monotonic() - started
            _, status, _ = pending.result()
            answered_s = time.monotonic() - started
            server.wait_until(True)
            assert status == (500 if hangs else 200)
            costs.append((not_ready_s, answered_s, time.monotonic() - started))
    not_ready_s, answered_s, ready_s = (max(seconds) for seconds in zip(*costs, strict=True))
    record_property("A7", f"{not_ready_s:.2f} s, {answered_s:.2f} s, {ready_s:.2f} s at most, in {n}")
    assert not_ready_s <= 1
    assert answered_s <= 2
    assert ready_s <= 5


def open_worker(bundle: Path, device: str = "cpu") -> Worker:
    digest = Bundle(bundle).manifest.digest
    return Worker(str(bundle), precision="auto", device=device, threads=1, max_batch_tokens=0, digest=digest)


def test_a_worker_is_replaced_on_the_device_that_auto_chose(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = open_worker(tiny_bundle, "auto")
    commands: list[list[str]] = []
    popen = subprocess.Popen

    def listen(command: list[str], **named: Any) -> Any:
        commands.append(command)
        return popen(command, **named)

    monkeypatch.setattr(subprocess, "Popen", listen)
    worker._process.kill()
    worker._process.wait()
    worker.check()
    assert worker.alive
    precision, device, threads, *_ = commands[0][commands[0].index(str(tiny_bundle)) + 1 :]
    assert (precision, device, threads) == ("auto", "cpu", "1")
    worker.close()


def test_a_slow_batch_is_not_ended_by_a_thread_without_work(tiny_bundle: Path) -> None:
    worker = open_worker(tiny_bundle)
    worker._since[0] = time.monotonic() - worker.doubt_s - 1  # for long, and its patience is not over
    assert not worker.alive
    process = worker._process
    worker.check()
    assert (worker._process, process.poll()) == (process, None)
    worker.close()


def test_a_worker_closed_while_it_is_replaced_leaves_no_process(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = open_worker(tiny_bundle)
    start_process = worker._start

    def closed_first() -> None:
        worker.close()
        start_process()

    monkeypatch.setattr(worker, "_start", closed_first)
    worker._process.kill()
    worker._process.wait()
    worker.check()
    assert worker.n_restarts == 1
    assert worker._process.poll() is not None
    with pytest.raises(ClosedError):
        worker.embed_tokens([1])


def test_a_worker_that_cannot_be_started_is_tried_again(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = open_worker(tiny_bundle)
    embed = worker.embedders()[0]
    expected = embed([[2, 3]])

    def no_descriptors() -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(worker, "_spawn", no_descriptors)
        worker._process.kill()
        worker._process.wait()
        worker.check()
        for _ in range(2):
            with pytest.raises(StartError):
                embed([[2, 3]])
    assert not worker.alive

    def again() -> bool:
        worker.check()
        return worker.alive

    wait_for(again)
    np.testing.assert_array_equal(embed([[2, 3]]), expected)
    worker.close()


# The end


def drain_under_load(bundle: Path, rounds: int, connections: int, seconds: float) -> int:
    """Clients that keep their connections and go when told to; a request that was sent on one must be answered.

    Returns:
        How many were.
    """
    n_answered = 0
    for _ in range(rounds):
        server = start(bundle, "--drain-delay-s", "0.3")
        stop_at = time.monotonic() + seconds
        outcomes: Counter[str] = Counter()
        codes: list[int] = []
        ended = threading.Event()

        async def client(
            server: Server = server, outcomes: Counter[str] = outcomes, ended: threading.Event = ended
        ) -> None:
            message = wire.embed("今天天气真好")
            while not ended.is_set():
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                except OSError:
                    outcomes["refused"] += 1
                    return
                keep, first = True, True
                while keep and not ended.is_set():
                    try:
                        writer.write(message)
                        answer = await wire.read_answer(reader)
                    except (OSError, asyncio.IncompleteReadError):
                        # A new connection that only the kernel had taken was never the server's.
                        outcomes["refused" if first else "lost"] += 1
                        break
                    first = False
                    outcomes[str(answer.status)] += 1
                    keep = not answer.closes
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
        n_answered += outcomes["200"]
    return n_answered


def test_no_accepted_request_fails_when_the_server_is_told_to_end(tiny_bundle: Path) -> None:
    drain_under_load(tiny_bundle, rounds=1, connections=16, seconds=0.8)


@pytest.mark.long
def test_no_accepted_request_fails_in_fifty_ends(
    tiny_bundle: Path, cases: Callable[[int], int], record_property: Callable[[str, str], None]
) -> None:
    n = cases(50)
    n_answered = drain_under_load(tiny_bundle, rounds=n, connections=32, seconds=1.0)
    record_property("C9", f"0 in {n} ends, {n_answered:,} requests answered")


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


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with other weights."""
    folder = tmp_path_factory.mktemp("other")
    convert(str(write_checkpoint(folder / "m3e-tiny", seed=1)), folder / "tiny", with_token_embeddings=True)
    return folder / "tiny"


def reloaded(server: Server, result: str, times: int) -> bool:
    return server.metrics()[f"m3e_reloads_total[('result', '{result}')]"] == times


@pytest.mark.parametrize("swaps", [pytest.param(2, id="few"), pytest.param(50, id="many", marks=pytest.mark.long)])
def test_a_bundle_is_swapped_while_requests_run_and_a_damaged_one_is_refused(
    swaps: int, token_bundle: Path, other_bundle: Path, tmp_path: Path,
    cases: Callable[[int], int], record_property: Callable[[str, str], None],
) -> None:  # fmt: skip
    """Two bundles in turn, every tenth time and the last a damaged one; each answer is wholly one bundle's."""
    n = cases(swaps)
    damaged = Path(shutil.copytree(token_bundle, tmp_path / "damaged"))
    with (damaged / "tokenizer.json").open("r+b") as file:
        file.write(b" ")
    sides = [(bundle, vectors_of(bundle)) for bundle in (token_bundle, other_bundle)]
    folder = tmp_path / "served"

    def serve(bundle: Path) -> None:
        (tmp_path / "next").symlink_to(bundle)
        (tmp_path / "next").replace(folder)

    serve(token_bundle)
    with running(folder) as server, ThreadPoolExecutor(3) as pool:
        done = threading.Event()

        def of(texts: list[str]) -> set[int]:
            """The sides that gave these texts' vectors."""
            reply = server.post("/v1/embeddings", {"input": texts})
            assert reply.status == 200, reply
            rows = [np.array(item["embedding"], dtype=np.float32) for item in reply.json["data"]]
            pairs = list(zip(texts, rows, strict=True))
            return {i for i, (_, known) in enumerate(sides) if all(np.array_equal(known[t], row) for t, row in pairs)}

        def load() -> int:
            n_answers = 0
            while not done.is_set():
                assert len(of(random.sample(PLAIN, 3))) == 1
                assert server.post("/embed_all", {"inputs": PLAIN[0]}).status == 200
                n_answers += 2
            return n_answers

        loads = [pool.submit(load) for _ in range(3)]
        counts, current = Counter({"swapped": 0, "refused": 0}), 0
        for i in range(1, n + 1):
            worker = server.worker_pid()
            result = "refused" if i % 10 == 0 or i == n else "swapped"
            if result == "swapped":
                current = 1 - current
            serve(damaged if result == "refused" else sides[current][0])
            counts[result] += 1
            server.process.send_signal(signal.SIGHUP)
            wait_for(functools.partial(reloaded, server, result, counts[result]), 60)
            assert of(PLAIN[:2]) == {current}
            assert (server.worker_pid() != worker) is (result == "swapped")
        done.set()
        n_answers = sum(item.result() for item in loads)
        assert server.ready()
    record_property("C12", f"0 of {n_answers:,} answers in {n:,} swaps, {counts['refused']} of them refused")


def test_a_worker_that_is_replaced_does_not_bring_another_bundle(
    token_bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    """A folder was given another bundle, nobody said reload, and the process died: no answer instead of a mixed one."""
    folder = tmp_path / "served"
    folder.symlink_to(token_bundle)
    known = [vectors_of(bundle)[PLAIN[0]] for bundle in (token_bundle, other_bundle)]
    with running(folder) as server:

        def answer() -> Any:
            return np.array(server.post("/v1/embeddings", {"input": PLAIN[0]}).json["data"][0]["embedding"], np.float32)

        np.testing.assert_array_equal(answer(), known[0])
        (tmp_path / "next").symlink_to(other_bundle)
        (tmp_path / "next").replace(folder)
        np.testing.assert_array_equal(answer(), known[0])
        os.kill(server.worker_pid(), signal.SIGKILL)
        server.wait_until(False)
        for _ in range(3):
            reply = server.post("/v1/embeddings", {"input": PLAIN[0]})
            assert (reply.status, reply.json["error"]["code"]) == (503, "not_ready")
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(True)
        np.testing.assert_array_equal(answer(), known[1])
