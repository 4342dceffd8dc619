"""Queue, scheduler, Batcher and AsyncEncoder: order, bounds, failures kept to themselves, clean ends."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3e import (
    AsyncEncoder,
    Batcher,
    ClosedError,
    DeadlineError,
    Encoder,
    InferenceError,
    InputError,
    OverloadedError,
    WorkerLostError,
)
from m3e.plan import SPREAD
from m3e.scheduler import Scheduler
from m3e.token_queue import Job, TokenQueue

DIM = 3
FOREVER = float("inf")


def vectors_of(input_ids: list[list[int]]) -> np.ndarray[Any, Any]:
    """A model whose vector tells the text: its sum, its length, one."""
    return np.array([[sum(ids), len(ids), 1] for ids in input_ids], dtype=np.float32)


def job(*lengths: int, priority: Any = "interactive", deadline: float = FOREVER) -> Job:
    ids = [[1] * length for length in lengths]
    return Job(ids, DIM, priority=priority, deadline=deadline, on_done=lambda _: None, now=0.0)


class Gate:
    """A model that waits until it may run, and remembers its batches."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[list[int]]] = []

    def __call__(self, input_ids: list[list[int]]) -> np.ndarray[Any, Any]:
        self.batches.append(input_ids)
        self.entered.release()
        self.open.wait(10)
        return vectors_of(input_ids)


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


# The queue


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.sampled_from(["interactive", "bulk"])),
        max_size=25,
    ),
    budget=st.integers(1, 300),
    dropped=st.sets(st.integers(0, 24)),
    mixed=st.booleans(),
)
def test_every_text_is_taken_once_in_batches_of_similar_width_under_the_budget(
    requests: list[tuple[list[int], str]], budget: int, dropped: set[int], mixed: bool
) -> None:
    queue = TokenQueue(budget, mixed=mixed)
    jobs = [job(*lengths, priority=priority) for lengths, priority in requests]
    for item in jobs:
        queue.add(item)
    assert queue.n_tokens == sum(item.n_tokens for item in jobs)
    for i in dropped & set(range(len(jobs))):
        jobs[i].done = True
        queue.drop(jobs[i])
    live = [item for item in jobs if not item.done]
    assert (queue.n_tokens, queue.n_jobs) == (sum(item.n_tokens for item in live), len(live))
    seen = []
    while batch := queue.take(0.0)[0]:
        widths = [item.width for item in batch]
        assert max(widths) - min(widths) <= (SPREAD if mixed else 0)
        assert len(batch) == 1 or sum(widths) <= budget
        assert len(batch) == 1 or max(widths) * len(widths) <= 2 * budget
        seen += [(id(item.job), item.row) for item in batch]
    assert sorted(seen) == sorted((id(item), row) for item in live for row in range(len(item.input_ids)))
    assert (queue.n_tokens, queue.n_jobs) == (0, 0)


def test_the_oldest_text_leads_each_batch() -> None:
    queue = TokenQueue(1000)
    jobs = [job(100), job(7), job(100), job(8)]
    for item in jobs:
        queue.add(item)
    led = [[jobs.index(item.job) for item in queue.take(0.0)[0]] for _ in range(2)]
    assert led == [[0, 2], [1, 3]]


def test_texts_of_other_widths_join_the_nearest_first() -> None:
    queue = TokenQueue(64, mixed=True)
    jobs = [job(20), job(33), job(9), job(28), job(12, priority="bulk"), job(20), job(80)]
    for item in jobs:
        queue.add(item)
    led = [[jobs.index(item.job) for item in queue.take(0.0)[0]] for _ in range(3)]
    assert led == [[0, 5, 2, 4], [1, 3], [6]]  # 28 do not fit any more


def test_a_batchs_rectangle_has_at_most_twice_the_budget() -> None:
    queue = TokenQueue(64, mixed=True)
    queue.add(job(28, *[4] * 9))
    assert [len(queue.take(0.0)[0]) for _ in range(2)] == [4, 6]  # 4 rows of 28


def test_long_texts_meet_others_where_widths_mix() -> None:
    for mixed, widths in ((True, [[104, 104], [200]]), (False, [[101], [103], [200]])):
        queue = TokenQueue(384, mixed=mixed)
        queue.add(job(101, 103, 200))
        assert [[item.width for item in queue.take(0.0)[0]] for _ in widths] == widths
        assert queue.n_jobs == 0


def test_interactive_neighbours_of_other_widths_go_before_bulk() -> None:
    queue = TokenQueue(64, mixed=True)
    jobs = [job(20, 20, 20, priority="bulk"), job(20), job(24), job(16)]
    for item in jobs:
        queue.add(item)
    assert [jobs.index(item.job) for item in queue.take(0.0)[0]] == [1, 3, 2]


def test_interactive_goes_first_and_bulk_does_not_starve() -> None:
    queue = TokenQueue(100)
    for _ in range(4):
        queue.add(job(100, priority="bulk"))
    for _ in range(12):
        queue.add(job(90))
    order = [queue.take(0.0)[0][0].job.priority[0] for _ in range(16)]
    assert "".join(order) == "iiibiiibiiibiiib"


def test_expired_jobs_are_never_taken(cases: Callable[[int], int], record_property: Callable[[str, str], None]) -> None:
    """Jobs come and are taken at times in any order; whoever is late is told and not run."""
    rng, n = random.Random(0), cases(1000)
    queue, now, taken, expired = TokenQueue(60), 0.0, list[Job](), list[Job]()
    jobs = [job(*rng.choices(range(1, 40), k=rng.randint(1, 3)), deadline=rng.uniform(0, n / 10)) for _ in range(n)]
    for each in jobs:
        queue.add(each)
        now += rng.uniform(0, 0.2)
        if rng.random() < 0.7:
            batch, late = queue.take(now)
            assert all(item.job.deadline > now for item in batch)
            taken += [item.job for item in batch]
            expired += late
    while queue.n_tokens:
        batch, late = queue.take(now)
        assert all(item.job.deadline > now for item in batch)
        taken += [item.job for item in batch]
        expired += late
    assert all(isinstance(each.error, DeadlineError) and each.done for each in expired)
    assert {*taken, *expired} == {*jobs}
    record_property("C8", f"0 of {len(expired):,} that expired, among {n:,}")
    assert n // 10 < len(expired) < n


# The scheduler


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


# Batcher and AsyncEncoder


def test_batches_are_as_large_as_the_device_likes(tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def embed(input_ids: list[list[int]]) -> Any:
        sizes.append(len(input_ids))
        return original(input_ids)

    async def encode() -> None:
        async with AsyncEncoder(tiny_encoder) as encoder:
            await encoder.encode(["a b"] * 12)

    original = tiny_encoder.embed
    monkeypatch.setattr(tiny_encoder, "embed", embed)
    monkeypatch.setattr(tiny_encoder._running.session, "max_shared_batch_tokens", 12)  # a text has four tokens
    with Batcher(tiny_encoder) as batcher:
        batcher.encode(["a b"] * 12)
    asyncio.run(encode())
    with Batcher(tiny_encoder, max_batch_tokens=16) as batcher:
        batcher.encode(["a b"] * 12)
    assert sizes[:8] == [3] * 8
    assert sizes[8:] == [4] * 3


def test_threads_get_the_encoders_vectors(tiny_encoder: Encoder, sentences: list[str]) -> None:
    texts = [text for text in sentences if len(text) < 300][:120]
    expected = tiny_encoder.encode(texts, normalize_embeddings=True)
    with Batcher(tiny_encoder) as batcher, ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda text: batcher.encode(text, normalize_embeddings=True), texts))
        parts = list(pool.map(lambda i: batcher.encode(texts[i : i + 7], truncate_dim=8), range(0, 112, 7)))
    np.testing.assert_array_equal(np.stack(alone), expected)
    np.testing.assert_array_equal(np.concatenate(parts), tiny_encoder.encode(texts[:112], truncate_dim=8))


def test_an_empty_list_and_wrong_arguments(tiny_encoder: Encoder) -> None:
    with Batcher(tiny_encoder) as batcher:
        assert batcher.encode([]).shape == (0, 64)
        with pytest.raises(InputError, match="sentences"):
            batcher.encode([1])  # type: ignore[list-item]
        with pytest.raises(InputError, match="no prompt named"):
            batcher.encode("a", prompt_name="x")
    with pytest.raises(ClosedError):
        batcher.encode("a")


def test_a_thread_gives_up_at_its_deadline(tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = tiny_encoder.embed
    monkeypatch.setattr(tiny_encoder, "embed", lambda ids: (gate.wait(10), real(ids))[1])
    with Batcher(tiny_encoder) as batcher:
        with pytest.raises(DeadlineError, match="0\\.05"):
            batcher.encode("a", timeout_s=0.05)
        gate.set()
        assert batcher.encode("a").shape == (64,)


@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")
def test_tasks_get_the_encoders_vectors(tiny_encoder: Encoder, sentences: list[str]) -> None:
    texts = [*[text for text in sentences if len(text) < 300][:60], "长" * 3000]
    expected = tiny_encoder.encode(texts[:-1])

    async def main() -> list[Any]:
        async with AsyncEncoder(tiny_encoder) as encoder:
            assert (await encoder.encode([])).shape == (0, 64)
            return list(await asyncio.gather(*(encoder.encode(text) for text in texts)))

    np.testing.assert_array_equal(np.stack(asyncio.run(main())[:-1]), expected)


def test_a_bundle_is_opened_without_stopping_the_loop_and_a_closed_encoder_says_so(tiny_bundle: Any) -> None:
    async def main() -> None:
        encoder = AsyncEncoder(tiny_bundle)
        with pytest.raises(ClosedError, match="async with"):
            await encoder.encode("a")
        async with encoder:
            assert (await encoder.encode("a")).shape == (64,)
        with pytest.raises(ClosedError):
            await encoder.encode("a")

    asyncio.run(main())


def test_a_cancelled_task_takes_its_texts_along(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    one_at_a_time = Encoder(tiny_bundle, num_threads=1)
    real = one_at_a_time.embed
    monkeypatch.setattr(one_at_a_time, "embed", lambda ids: (gate(ids), real(ids))[1])

    async def main() -> None:
        async with AsyncEncoder(one_at_a_time) as encoder:
            first = asyncio.create_task(encoder.encode("a"))
            await asyncio.to_thread(gate.entered.acquire)
            gone = [asyncio.create_task(encoder.encode("b c d")) for _ in range(20)]
            late = asyncio.create_task(encoder.encode("b c d", timeout_s=0.02))
            await asyncio.sleep(0.05)
            for task in gone:
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
            gate.open.set()
            await first
            with pytest.raises(DeadlineError):
                await late

    asyncio.run(main())
    assert len(gate.batches) == 1


@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")
def test_the_loop_stays_free_while_long_texts_are_tokenised(tiny_encoder: Encoder) -> None:
    async def main() -> int:
        async with AsyncEncoder(tiny_encoder) as encoder:
            task = asyncio.create_task(encoder.encode(["天气 " * 2_700] * 20))
            n_turns = 0
            while not task.done():
                await asyncio.sleep(0.001)
                n_turns += 1
            return n_turns

    assert asyncio.run(main()) >= 10


def test_another_priority_is_refused(tiny_encoder: Encoder) -> None:
    with Batcher(tiny_encoder) as batcher, pytest.raises(InputError, match="priority is 'high', expected one of"):
        batcher.encode("a", priority="high")  # type: ignore[arg-type]
