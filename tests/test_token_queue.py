"""Requests that wait: every text once, in order, in batches within their bounds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from m3e import DeadlineError
from m3e.plan import SPREAD
from m3e.token_queue import Job, TokenQueue

DIM = 3
FOREVER = float("inf")


def job(*lengths: int, priority: Any = "interactive", deadline: float = FOREVER) -> Job:
    ids = [[1] * length for length in lengths]
    return Job(ids, DIM, priority=priority, deadline=deadline, on_done=lambda _: None, now=0.0)


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
