"""The arithmetic of the questions, against slow references written here."""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.serving import histogram, quantile
from m3e import InputError
from m3e_bench import budget
from m3e_bench.peers import ENGINES, choose
from m3e_bench.questions.accuracy import compare_vectors, rank
from m3e_bench.questions.roofline import _count_tokens
from m3e_bench.questions.throughput import _decide_parts
from m3e_bench.record import Journal, Series
from m3e_bench.statistics import ratio
from m3e_bench.workloads import (
    Workload,
    accuracy_texts,
    check_data,
    every_nth_batch,
    labelled_pairs,
    sized_texts,
    speed_workloads,
)

Array = np.ndarray[Any, Any]


def slow_ranks(x: Array) -> Array:
    return np.array([np.mean([sum(b < a for b in x) + 1, sum(b <= a for b in x)]) for a in x])


@pytest.mark.parametrize("name", ["zh-stsb", "zh-lcqmc"])
def test_the_correlation_is_of_labels_and_cosines_of_each_pair(name: str) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((120, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (vectors[:60] * vectors[60:]).sum(axis=1)
    scores = np.clip(np.round(3 + 2 * cosines + rng.standard_normal(60)), 0, 5)
    expected = np.corrcoef(slow_ranks(cosines), slow_ranks(scores))[0, 1]
    assert rank(vectors, scores, name)["spearman"] == pytest.approx(expected, abs=1e-12)


def test_the_same_vectors_are_equal_in_every_figure() -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    assert compare_vectors(vectors, 3 * vectors) == pytest.approx(
        {"cosine_mean": 1, "cosine_p1": 1, "cosine_min": 1, "top10_overlap": 1}, abs=1e-6
    )


def test_figures_of_vectors_that_moved() -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((40, 8))
    moved = expected + 0.5 * rng.standard_normal((40, 8))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (moved, expected)]
    cosines = [float(a @ b) for a, b in zip(*unit, strict=True)]

    def nearest(x: Array, row: int) -> set[int]:
        others = [other for other in range(len(x)) if other != row]
        return set(sorted(others, key=lambda other: -float(x[row] @ x[other]))[:10])

    overlap = np.mean([len(nearest(unit[0], row) & nearest(unit[1], row)) / 10 for row in range(40)])
    found = compare_vectors(moved, expected)
    assert found["cosine_mean"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found["cosine_min"] == pytest.approx(min(cosines), abs=1e-6)
    assert found["top10_overlap"] == pytest.approx(overlap, abs=1e-9)


@pytest.mark.parametrize(("name", "alike", "unlike"), [("zh-lcqmc", 1.0, 0.0), ("en-stsb", 4.0, 3.9)])
def test_ndcg_of_a_worked_example(name: str, alike: float, unlike: float) -> None:
    """Four queries whose own answers come first, third, last of twelve and tenth."""
    corpus = np.eye(12)
    left = np.zeros((12, 12))
    left[0, 0] = 1
    left[1, [4, 5, 1]] = 3, 2, 1
    left[2] = np.linspace(2, 1, 12)
    left[2, 2] = 0.1
    left[3, [0, 1, 2, 4, 5, 6, 7, 8, 9]] = 2
    left[3, 3] = 1
    vectors = np.concatenate([left, corpus])
    scores = np.array([alike] * 4 + [unlike] * 8)
    expected = (1 + 1 / math.log2(4) + 0 + 1 / math.log2(11)) / 4
    assert rank(vectors, scores, name)["ndcg_at_10"] == pytest.approx(expected)


def test_a_ratio_has_the_spread_of_its_rounds() -> None:
    def of(*rounds: float) -> Series:
        return Series("throughput", "m", "1/s", "higher", "m", "e", tuple((x,) for x in rounds))

    found = ratio(of(100, 50, 90), of(10, 10, 10))
    assert (found.value, found.low, found.high) == (9, 5, 10)


def test_texts_of_a_length_have_that_length(tiny_encoder: Any) -> None:
    for length in (8, 12, 128, 500):
        assert set(tiny_encoder.count_tokens(sized_texts(length, 20))) == {length}


def test_tokens_are_counted_as_the_model_cuts(tiny_bundle: Path) -> None:
    run: Any = types.SimpleNamespace(engines=ENGINES, launcher=types.SimpleNamespace(bundle=lambda *_: tiny_bundle))
    model: Any = None
    assert _count_tokens(run, model, ("好" * 10, "好" * 600)) == 12 + 512


def test_workloads_are_the_same_every_time_and_work_without_data(data_dir: Path | None) -> None:
    for data in {None, data_dir}:
        first, second = speed_workloads(data), speed_workloads(data)
        assert first == second
        assert all(workload.texts and all(workload.texts) for workload in first)
        assert len({workload.sha256 for workload in first}) == 2
    assert labelled_pairs(None, "zh", None) == []
    assert len(accuracy_texts("en", 100)) >= 100


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_a_part_of_a_workload_costs_its_share_of_padding(n: int) -> None:
    """The padded tokens of batches of 32, per text, are those of the whole; a random part would have more."""

    def padded(texts: tuple[str, ...]) -> float:
        ordered = sorted(texts, key=len, reverse=True)
        return sum(len(ordered[i]) * len(ordered[i : i + 32]) for i in range(0, len(ordered), 32)) / len(texts)

    lengths = np.random.default_rng(0).choice([10, 12, 15, 90, 200, 512], 512, p=[0.3, 0.3, 0.2, 0.1, 0.05, 0.05])
    whole = tuple(f"{i:05}".ljust(length, "字") for i, length in enumerate(lengths))
    part = every_nth_batch(whole, n)
    assert len(part) == len(set(part)) == 512 // n // 32 * 32 + 32 * (512 // 32 % n > n // 2)
    assert set(part) <= set(whole)
    assert part == every_nth_batch(whole, n)
    waste, real = padded(part), float(np.mean([len(text) for text in part]))
    batches = [sorted(whole, key=len, reverse=True)[i : i + 32] for i in range(0, 512, 32)]
    kept = [batch for batch in batches if batch[0] in part]
    assert all(set(batch) <= set(part) for batch in kept)
    assert waste == pytest.approx(sum(len(batch[0]) for batch in kept) / len(kept))
    assert real <= waste


def test_the_public_sets_are_read_whole(data_dir: Path | None) -> None:
    if data_dir is None:
        return  # the sets are not published with the project; the shipped corpus is tested above
    lcqmc, mixed = speed_workloads(data_dir)
    assert (lcqmc.name, len(lcqmc.texts), mixed.name, len(mixed.texts)) == ("lcqmc", 2000, "mixed", 500)
    sets = [*labelled_pairs(data_dir, "zh", None), *labelled_pairs(data_dir, "en", None)]
    assert {pairs.name: len(pairs.scores) for pairs in sets} == {"zh-stsb": 1361, "zh-lcqmc": 2000, "en-stsb": 1379}
    assert all(0 <= score <= 5 for pairs in sets for score in pairs.scores)


def test_a_data_folder_that_lacks_a_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zh-stsb-test.tsv").touch()
    with pytest.raises(InputError, match=r"lacks zh-lcqmc-test\.tsv, zh-sohu-dc-test\.jsonl, en-stsb\.tsv\.gz"):
        check_data(tmp_path)


def test_engines_are_picked_by_name_and_endpoints_by_address() -> None:
    assert choose(None, []) == list(ENGINES)
    (only, endpoint) = choose(["m3e-int8"], ["tei=http://localhost:8080/v1,model=m3e-base,key_variable=KEY"])
    assert only.name == "m3e-int8"
    assert dict(endpoint.options) == {"url": "http://localhost:8080/v1", "model": "m3e-base", "key_variable": "KEY"}
    with pytest.raises(InputError, match="no engines"):
        choose(["m3e-int9"], [])
    for text in ("localhost:8080", "tei=localhost", "tei=http://host/v1,colour=red"):
        with pytest.raises(InputError, match="expected NAME=http"):
            choose([], [text])


@pytest.mark.parametrize(("bounds", "parts"), [(budget.FULL, 2), (budget.QUICK, 10)])
def test_a_slow_workload_is_cut_but_keeps_its_least_batches(tmp_path: Path, bounds: budget.Budget, parts: int) -> None:
    journal = Journal(tmp_path / "journal.jsonl", {})
    journal.keep_fact("whole workload in seconds/long/tiny/slow", 1000.0)
    run: Any = types.SimpleNamespace(journal=journal, engines=[], budget=bounds)
    model: Any = types.SimpleNamespace(name="tiny")
    _decide_parts(run, model, Workload("long", ("a",) * 320, ""))
    assert journal.fact("parts/long/tiny") == parts


def test_a_quantile_lies_evenly_within_its_bucket() -> None:
    def slowly(buckets: list[tuple[float, float]], share: float) -> float:
        below, lower = 0.0, 0.0
        for bound, count in buckets:
            if count > below and count >= share * buckets[-1][1]:
                return lower + (bound - lower) * (share * buckets[-1][1] - below) / (count - below)
            below, lower = count, bound
        return float("nan")

    buckets = [(1.0, 0.0), (2.0, 3.0), (3.0, 3.0), (5.0, 10.0), (8.0, 10.0)]
    for share in (0.01, 0.1, 0.29, 0.5, 0.99):
        assert quantile(buckets, share) == pytest.approx(slowly(buckets, share))
    assert np.isnan(quantile([(1.0, 0.0), (2.0, 0.0)], 0.5))
    assert histogram({"x_bucket[('le', '1.0')]": 1}, {"x_bucket[('le', '1.0')]": 3, "y": 1}, "x") == [(1.0, 2)]
