"""The inference process fails, hangs or dies: neighbours get their vectors, and it is replaced."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.server_process import FAILING, Server, running
from m3e import Encoder
from m3e.bundle import Bundle
from m3e.errors import ClosedError, StartError
from m3e.server.worker import Worker
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
    return dict(zip(PLAIN, Encoder(tiny_bundle).encode(PLAIN, normalize_embeddings=True), strict=True))


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
