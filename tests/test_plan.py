"""Batches: what every plan must hold, whatever the lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3e.plan import attention_length, attention_width, plan_batches

lengths = st.lists(st.integers(0, 600), max_size=200)
token_bounds = st.integers(1, 2048)
size_bounds = st.none() | st.integers(1, 64)


def plan(
    n_tokens: list[int], max_batch_tokens: int, max_batch_size: int | None = None, at_once: int = 1
) -> list[list[int]]:
    batches = plan_batches(np.array(n_tokens, dtype=np.int64), max_batch_tokens, max_batch_size, at_once)
    return [batch.tolist() for batch in batches]


def width(n_tokens: list[int], batch: list[int]) -> int:
    return int(attention_length(np.array([n_tokens[index] for index in batch])).max())


@given(n_tokens=lengths)
def test_the_width_of_one_text_is_that_of_the_plan(n_tokens: list[int]) -> None:
    assert [attention_width(n) for n in n_tokens] == attention_length(np.array(n_tokens, dtype=np.int64)).tolist()


@given(n_tokens=lengths, max_tokens=token_bounds, max_size=size_bounds, at_once=st.integers(1, 5))
def test_every_index_exactly_once(n_tokens: list[int], max_tokens: int, max_size: int | None, at_once: int) -> None:
    batches = plan(n_tokens, max_tokens, max_size, at_once)
    assert sorted(index for batch in batches for index in batch) == list(range(len(n_tokens)))
    assert all(batches)


@given(n_tokens=lengths, max_tokens=token_bounds, max_size=size_bounds)
def test_budgets_are_respected(n_tokens: list[int], max_tokens: int, max_size: int | None) -> None:
    for batch in plan(n_tokens, max_tokens, max_size):
        assert len({width(n_tokens, [index]) for index in batch}) == 1
        padded = len(batch) * width(n_tokens, batch)
        assert padded <= max_tokens or len(batch) == 1
        assert max_size is None or len(batch) <= max_size


@given(n_tokens=lengths, max_tokens=token_bounds, max_size=size_bounds, at_once=st.integers(1, 5))
def test_one_length_gets_equal_batches_for_all_that_run_at_once(
    n_tokens: list[int], max_tokens: int, max_size: int | None, at_once: int
) -> None:
    batches = plan(n_tokens, max_tokens, max_size, at_once)
    for own in {width(n_tokens, batch) for batch in batches}:
        sizes = [len(batch) for batch in batches if width(n_tokens, batch) == own]
        most = min(max(1, max_tokens // own), max_size or len(n_tokens))
        needed = -(-sum(sizes) // most)
        multiples = range(at_once, needed + at_once + 1, at_once)
        wanted = next(multiple for multiple in multiples if multiple >= needed) if needed > 1 else 1
        assert len(sizes) == min(wanted, sum(sizes))
        assert max(sizes) - min(sizes) <= 1


@given(n_tokens=lengths, max_tokens=token_bounds, max_size=size_bounds)
def test_widest_first_and_one_width_in_order(n_tokens: list[int], max_tokens: int, max_size: int | None) -> None:
    order = [index for batch in plan(n_tokens, max_tokens, max_size) for index in batch]
    assert order == sorted(range(len(n_tokens)), key=lambda index: (-width(n_tokens, [index]), index))


@given(n_tokens=lengths, max_tokens=token_bounds, max_size=size_bounds)
def test_the_same_lengths_give_the_same_plan(n_tokens: list[int], max_tokens: int, max_size: int | None) -> None:
    assert plan(n_tokens, max_tokens, max_size) == plan(list(n_tokens), max_tokens, max_size)


def test_no_texts_no_batches() -> None:
    assert plan([], 1024) == []
    assert plan([], 1024, 8) == []


@pytest.mark.parametrize(
    ("n_tokens", "max_tokens", "max_size", "expected"),
    [
        pytest.param([5], 1024, None, [[0]], id="one text"),
        pytest.param([512, 600, 3], 512, None, [[1], [0], [2]], id="longer than the budget runs alone"),
        pytest.param([4, 4, 4, 4], 8, None, [[0, 1], [2, 3]], id="exactly the budget"),
        pytest.param([4, 4, 4, 4], 1024, 3, [[0, 1], [2, 3]], id="bounded by the rows"),
        pytest.param([1, 9, 5, 8, 65, 66], 1024, None, [[5], [4], [1], [2, 3], [0]], id="one width a batch"),
        pytest.param([0, 1], 1024, None, [[0, 1]], id="no tokens count as one"),
    ],
)
def test_plans(n_tokens: list[int], max_tokens: int, max_size: int | None, expected: list[list[int]]) -> None:
    assert plan(n_tokens, max_tokens, max_size) == expected


def test_the_input_stays_as_it_was() -> None:
    n_tokens = np.array([3, 9, 1], dtype=np.int64)
    list(plan_batches(n_tokens, 8))
    assert n_tokens.tolist() == [3, 9, 1]
