"""Work ahead: order, bounds, what an early end leaves, and threads that stay for the next call."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from m3e import Encoder
from m3e.overlap import Workers

MANY = [f"今天天气真好 {i} " + "好" * (i % 37) for i in range(400)]


def test_working_ahead_keeps_order_takes_little_and_stops() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for k in range(100):
            taken.append(k)
            yield k

    results = Workers(2).ahead(lambda k: k * k, items())
    assert next(results) == 0
    assert len(taken) <= 9
    assert [next(results) for _ in range(5)] == [1, 4, 9, 16, 25]
    results.close()  # type: ignore[attr-defined]
    assert len(taken) < 18
    with pytest.raises(ZeroDivisionError):
        list(Workers(1).ahead(lambda k: 1 // (k - 3), range(10)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(Workers(1).ahead(str, [])) == []


def test_an_early_end_waits_for_what_has_begun_and_begins_nothing_more() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def work(k: int) -> int:
        begun.append(k)
        time.sleep(0.05)
        ended.append(k)
        return k

    workers = Workers(2)
    results = workers.ahead(work, range(100))
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert sorted(begun) == sorted(ended)
    assert len(begun) <= 5  # of the nine that were taken
    left = list(begun)
    assert list(workers.ahead(lambda k: -k, range(3))) == [0, -1, -2]  # the same threads, free again
    assert begun == left


def test_callers_share_the_threads() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work(k: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        return k

    workers = Workers(2)
    results: dict[int, list[int]] = {}

    def call(caller: int) -> None:
        results[caller] = list(workers.ahead(work, range(caller, caller + 20)))

    callers = [threading.Thread(target=call, args=(100 * i,)) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(20)
    assert results == {100 * i: list(range(100 * i, 100 * i + 20)) for i in range(8)}
    assert most == 2


def test_calls_start_no_threads_anew_and_an_encoder_that_is_gone_leaves_none(tiny_bundle: Path) -> None:
    encoder = Encoder(tiny_bundle, num_threads=2)
    before = set(threading.enumerate())
    encoder.encode("今天天气真好")
    assert set(threading.enumerate()) == before
    encoder.encode(MANY)
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    encoder.encode(MANY)
    assert set(threading.enumerate()) - before == started
    del encoder
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()
