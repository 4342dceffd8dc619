"""Batches: what every plan must hold, whatever the lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3e.plan import SPREAD, attention_length, attention_width, plan_batches

lengths = st.lists(st.integers(0, 600), max_size=200) | st.lists(st.integers(0, 40), max_size=200)
token_bounds = st.integers(1, 2048)
size_bounds = st.none() | st.integers(1, 64)


def plan(
    n_tokens: list[int],
    max_batch_tokens: int,
    max_batch_size: int | None = None,
    at_once: int = 1,
    *,
    mixed: bool = False,
) -> list[list[int]]:
    batches = plan_batches(np.array(n_tokens, dtype=np.int64), max_batch_tokens, max_batch_size, at_once, mixed=mixed)
    return [batch.tolist() for batch in batches]


def widths(n_tokens: list[int], batch: list[int], *, mixed: bool = False) -> list[int]:
    return [attention_width(n_tokens[index], mixed=mixed) for index in batch]


@given(n_tokens=lengths, mixed=st.booleans())
def test_the_width_of_one_text_is_that_of_the_plan(n_tokens: list[int], mixed: bool) -> None:
    found = attention_length(np.array(n_tokens, dtype=np.int64), mixed=mixed).tolist()
    assert [attention_width(n, mixed=mixed) for n in n_tokens] == found
    for n, width in zip(n_tokens, found, strict=True):
        assert max(n, 1) <= width < max(n, 1) + 4
        assert width % 4 == 0 or (n > 64 and not mixed)


@given(n_tokens=lengths, max_tokens=token_bounds, max_size=size_bounds, at_once=st.integers(1, 5), mixed=st.booleans())
def test_every_index_exactly_once_under_the_budgets(
    n_tokens: list[int], max_tokens: int, max_size: int | None, at_once: int, mixed: bool
) -> None:
    batches = plan(n_tokens, max_tokens, max_size, at_once, mixed=mixed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(n_tokens)))
    for batch in batches:
        own = widths(n_tokens, batch, mixed=mixed)
        assert max(own) - min(own) <= (SPREAD if mixed else 0)
        assert sum(own) <= max_tokens or len(batch) == 1
        assert max(own) * len(batch) <= 2 * max_tokens or len(batch) == 1
        assert max_size is None or len(batch) <= max_size


@given(
    n=st.integers(1, 200), length=st.integers(0, 600), max_tokens=token_bounds, max_size=size_bounds,
    at_once=st.integers(1, 5),
)  # fmt: skip
def test_one_length_gets_equal_batches_for_all_that_run_at_once(
    n: int, length: int, max_tokens: int, max_size: int | None, at_once: int
) -> None:
    own = attention_width(length)
    sizes = [len(batch) for batch in plan([length] * n, max_tokens, max_size, at_once)]
    assert max(sizes) - min(sizes) <= 1
    needed = -(-n // min(max(1, max_tokens // own), max_size or n))
    assert len(sizes) >= needed
    if n > 1 and (needed > 1 or n * own >= 48 * at_once):
        # Shares of fewer than one text each leave some empty.
        assert len(sizes) % at_once == 0 or len(sizes) == n
    else:
        assert len(sizes) == 1
    assert len(sizes) < needed + at_once


@pytest.mark.parametrize("n_tokens", [[200] * 8192, [200] + [188] * 8191, [132] + [128] * 8191])
def test_many_texts_that_fill_batches_badly_are_planned_in_one_pass(n_tokens: list[int]) -> None:
    """Each batch takes as many as fit; a search for equal shares would take seconds here."""
    batches = plan(n_tokens, 384, None, 2, mixed=True)
    rows = 384 // min(n_tokens)
    assert len(batches) <= -(-len(n_tokens) // rows) + 2


@given(n_tokens=lengths, at_once=st.integers(1, 4))
def test_texts_of_similar_length_are_shared_out_evenly(n_tokens: list[int], at_once: int) -> None:
    """By tokens, give or take a text, whatever their number."""
    n_tokens = [1 + n % (SPREAD - 4) for n in n_tokens]
    batches = plan(n_tokens, 384, None, at_once, mixed=True)
    tokens = [sum(widths(n_tokens, batch, mixed=True)) for batch in batches]
    if sum(tokens) >= 48 * at_once and len(n_tokens) > 4 * at_once:
        assert len(batches) % at_once == 0
        assert max(tokens) - min(tokens) <= 2 * SPREAD
        assert len(batches) < sum(tokens) / 384 + 2 * at_once


@given(n_tokens=lengths, max_tokens=token_bounds, max_size=size_bounds, mixed=st.booleans())
def test_widest_first_and_one_width_in_order(
    n_tokens: list[int], max_tokens: int, max_size: int | None, mixed: bool
) -> None:
    order = [index for batch in plan(n_tokens, max_tokens, max_size, mixed=mixed) for index in batch]
    assert order == sorted(range(len(n_tokens)), key=lambda index: (-widths(n_tokens, [index], mixed=mixed)[0], index))


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


@pytest.mark.parametrize(
    ("n_tokens", "at_once", "expected"),
    [
        pytest.param([12, 5, 27], 1, [[2, 0, 1]], id="several widths share a batch"),
        pytest.param([12, 5, 40], 1, [[2], [0, 1]], id="unless they are far apart"),
        pytest.param([24, 26, 48, 30], 2, [[2, 3], [1, 0]], id="a thread each"),
        pytest.param([28, 36, 28], 2, [[1, 0, 2]], id="too little for a thread each"),
    ],
)
def test_mixed_plans(n_tokens: list[int], at_once: int, expected: list[list[int]]) -> None:
    assert plan(n_tokens, 384, None, at_once, mixed=True) == expected


def test_where_equal_shares_are_too_large_batches_are_full() -> None:
    # Shares of 22 tokens would put the last three together, 32 tokens.
    assert plan([28, 28, 20, 8, 4], 28, mixed=True) == [[0], [1], [2, 3], [4]]
    # 384 tokens in all, but a rectangle of 96 x 28; at most 2 x 384 cells are 27 rows.
    assert [len(batch) for batch in plan([28] + [4] * 89, 384, mixed=True)] == [27, 63]
    # Equal shares of the tokens are eleven of the short texts.
    assert max(map(len, plan([28, 28] + [4] * 30, 384, 8, mixed=True))) <= 8


def test_the_input_stays_as_it_was() -> None:
    n_tokens = np.array([3, 9, 1], dtype=np.int64)
    list(plan_batches(n_tokens, 8))
    assert n_tokens.tolist() == [3, 9, 1]
