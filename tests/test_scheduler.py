"""The threads that run batches: bounds on what waits, failures kept to themselves, clean ends."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3e import ClosedError, DeadlineError, InferenceError, InputError, OverloadedError, WorkerLostError
from m3e.scheduler import Scheduler
from m3e.token_queue import Job
from tests.gates import Gate, vectors_of

DIM = 3


@contextlib.contextmanager
def scheduler(*embed: Any, **named: Any) -> Any:
    made = Scheduler(embed or [vectors_of], dim=DIM, **named)
    try:
        yield made
    finally:
        made.close(drain=False, timeout_s=5)


def run(made: Scheduler, ids: list[list[int]], **named: Any) -> Job:
    done = threading.Event()
    submitted = made.submit(ids, lambda _: done.set(), **named)
    assert done.wait(10)
    return submitted


def test_an_idle_scheduler_does_not_wait() -> None:
    with scheduler() as made:
        times = []
        for _ in range(50):
            started = time.perf_counter()
            run(made, [[1, 2]])
            times.append(time.perf_counter() - started)
        assert min(times) < 0.002


def test_texts_gather_while_a_batch_runs() -> None:
    gate = Gate()
    with scheduler(gate) as made:
        first = made.submit([[1]], lambda _: None)
        gate.entered.acquire()
        rest = [made.submit([[i, i]], lambda _: None) for i in range(10)]
        gate.open.set()
        gate.entered.acquire()
        made.close()
        assert [len(batch) for batch in gate.batches] == [1, 10]
        assert first.vectors.tolist() == [[1, 1, 1]]
        assert [item.vectors[0, 0] for item in rest] == [2 * i for i in range(10)]


def test_the_queue_is_bounded_in_tokens_all_or_nothing_but_lets_one_large_request_in() -> None:
    gate = Gate()
    with scheduler(gate, max_queue_tokens=10) as made:
        made.submit([[1]], lambda _: None)
        gate.entered.acquire()
        made.submit([[1] * 50], lambda _: None)
        with pytest.raises(OverloadedError, match="50 tokens of 1 requests wait") as caught:
            made.submit([[1]], lambda _: None)
        assert caught.value.retry_after_s > 0
        assert made.n_waiting_tokens == 50
        gate.open.set()


def test_the_predicted_wait_is_bounded_beyond_64_requests() -> None:
    gate = Gate()
    with scheduler(gate, max_queue_ms=1.0) as made:
        gate.open.set()
        run(made, [[1]])
        gate.open.clear()
        made._tokens_per_s = 10.0
        made.submit([[1]], lambda _: None)
        gate.entered.acquire()
        gate.entered.acquire()
        for _ in range(64):
            made.submit([[1]], lambda _: None)
        with pytest.raises(OverloadedError) as caught:
            made.submit([[1]], lambda _: None)
        assert caught.value.retry_after_s == pytest.approx(6.4)
        gate.open.set()


def test_cancelled_and_expired_work_is_not_run() -> None:
    gate = Gate()
    with scheduler(gate) as made:
        made.submit([[1]], lambda _: None)
        gate.entered.acquire()
        gone = [made.submit([[7, 7, 7]], lambda _: None) for _ in range(5)]
        for item in gone:
            made.cancel(item)
        late = made.submit([[8, 8]], lambda _: None, timeout_s=0.01)
        kept = made.submit([[9]], lambda _: None)
        assert made.n_waiting_tokens == 3
        time.sleep(0.02)
        gate.open.set()
        made.close()
        assert gate.batches == [[[1]], [[9]]]
        assert isinstance(late.error, DeadlineError)
        assert kept.error is None


@pytest.mark.parametrize("failure", ["raises", "nan", "wrong shape"])
@settings(max_examples=40, deadline=None)
@given(culprits=st.sets(st.integers(0, 39), max_size=6), data=st.data())
def test_a_failing_text_fails_alone(failure: str, culprits: set[int], data: st.DataObject) -> None:
    gate = threading.Event()

    def model(input_ids: list[list[int]]) -> np.ndarray[Any, Any]:
        gate.wait(10)
        vectors = vectors_of(input_ids)
        bad = [i for i, ids in enumerate(input_ids) if ids[0] in culprits]
        if bad and failure == "raises":
            raise RuntimeError("broken")
        if bad and failure == "wrong shape":
            return vectors[:, :2]
        vectors[bad] = np.nan
        return vectors

    with scheduler(model) as made:
        jobs = [made.submit([[i, 1]], lambda _: None) for i in range(40)]
        gate.set()
        made.close()
    for i, item in enumerate(jobs):
        if i in culprits:
            assert isinstance(item.error, InferenceError)
        else:
            assert item.error is None
            assert item.vectors.tolist() == [[i + 1, 2, 1]]


def test_when_the_process_is_lost_each_suspect_runs_alone() -> None:
    """Two threads; the culprit takes down whatever runs beside it, as a crash of their process would."""
    running: set[int] = set()
    lock, culprit = threading.Lock(), 13
    lost: set[int] = set()

    def model(input_ids: list[list[int]]) -> np.ndarray[Any, Any]:
        mine = {ids[0] for ids in input_ids}
        with lock:
            running.update(mine)
        time.sleep(0.002)
        with lock:
            if culprit in running:
                lost.update(running)
            running.difference_update(mine)
            if mine & lost:
                lost.difference_update(mine)
                raise WorkerLostError("died")
        return vectors_of(input_ids)

    with scheduler(model, model) as made:
        jobs = [made.submit([[i] * (1 + i % 9)], lambda _: None) for i in range(30)]
        made.close()
    assert [i for i, item in enumerate(jobs) if item.error is not None] == [culprit]


def test_close_drains_or_fails_what_waits_and_refuses_the_rest() -> None:
    for drain in (True, False):
        gate = Gate()
        made = Scheduler([gate], dim=DIM)
        made.submit([[1]], lambda _: None)
        gate.entered.acquire()
        waiting = made.submit([[2, 2]], lambda _: None)
        threading.Timer(0.05, gate.open.set).start()
        made.close(drain=drain)
        assert isinstance(waiting.error, ClosedError) is not drain
        with pytest.raises(ClosedError):
            made.submit([[1]], lambda _: None)


def test_bounds_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="max_batch_tokens is 0"):
        Scheduler([vectors_of], dim=DIM, max_batch_tokens=0)
    with pytest.raises(InputError, match="max_queue_tokens is 0"):
        Scheduler([vectors_of], dim=DIM, max_queue_tokens=0)
