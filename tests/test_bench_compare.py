from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from m3e import InputError
from m3e_bench.cli import main
from m3e_bench.compare import Condition, Outcome, compare_records
from m3e_bench.record import Record, parse_record
from tests.bench_records import make_content, series, waits

NOISE = 0.02


def measured(seed: int, slower: float = 1.0, drift: float = 1.0) -> Record:
    """A run as the suite measures it: rounds with a level of their own, samples with a tail, and a peer beside ours."""
    rng = np.random.default_rng(seed)
    levels = drift * (1 + NOISE * rng.standard_normal(5))
    ours = [list(slower * level * (5 + rng.gamma(2.0, 0.2, 60))) for level in levels]
    peer = [list(level * (20 + rng.gamma(2.0, 0.8, 60))) for level in levels]
    rates = [[1000 / slower / level * (1 + NOISE * rng.standard_normal())] for level in levels]
    peer_rates = [[250 / level * (1 + NOISE * rng.standard_normal())] for level in levels]
    found = [waits("m3e-int8", ours), waits("st-torch-fp32", peer), series("m3e-int8", rates)]
    return parse_record(make_content([*found, series("st-torch-fp32", peer_rates)]), "made up")


def failed(old: Record, new: Record, *conditions: str, relative_to: str | None = None) -> Outcome:
    return compare_records(old, new, [Condition.parse(text) for text in conditions], relative_to=relative_to)


@pytest.mark.parametrize("condition", ["p50>+5%", "p95>+5%", "sentences_per_s<-5%"])
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slowdown_of_ten_per_cent_is_caught_and_noise_is_not(seed: int, condition: str) -> None:
    old = measured(seed)
    assert failed(old, measured(seed + 100, slower=1.10), condition).failures
    assert not failed(old, measured(seed + 200), condition).failures
    assert not failed(old, measured(seed + 300, slower=0.9), condition).failures  # faster


@pytest.mark.parametrize("seed", range(3))
def test_ratios_to_a_peer_of_the_same_run_forgive_a_slower_machine_but_no_slower_code(seed: int) -> None:
    old = measured(seed)
    slow_machine = measured(seed + 100, drift=1.3)
    assert failed(old, slow_machine, "p50>+5%").failures
    assert not failed(old, slow_machine, "p50>+5%", relative_to="st-torch-fp32").failures
    both = measured(seed + 100, slower=1.1, drift=1.3)
    assert failed(old, both, "p50>+5%", relative_to="st-torch-fp32").failures


def test_only_the_engines_that_were_asked_for_are_compared() -> None:
    old = parse_record(make_content([series("m3e-int8", [[100.0]]), series("peer", [[100.0]])]), "old")
    new = parse_record(make_content([series("m3e-int8", [[100.0]]), series("peer", [[50.0]])]), "new")
    assert not failed(old, new, "sentences_per_s<-5%").failures
    conditions = [Condition.parse("sentences_per_s<-5%")]
    assert len(compare_records(old, new, conditions, engines="*").failures) == 1


def test_a_single_sample_is_taken_at_its_word() -> None:
    old, new = (
        parse_record(make_content([series("m3e-int8", [[x]], "cosine_min", question="accuracy", set="s")]), "r")
        for x in (0.999, 0.997)
    )
    assert failed(old, new, "cosine_min<-0.001").failures
    assert not failed(old, new, "cosine_min<-0.003").failures
    assert not failed(old, old, "cosine_min<-0.001").failures


@pytest.mark.parametrize("text", ["", "p95", "p95>", "p95=5%", "p95>+5%%", "P95 > 5 %", "p95>+5% or so"])
def test_a_condition_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected something like"):
        Condition.parse(text)


def test_a_condition_that_could_never_fail_is_refused() -> None:
    with pytest.raises(InputError, match=r"they share .*sentences_per_s"):
        failed(measured(0), measured(1), "first_vector_s>+5%")


def test_exit_codes_and_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("old.json", "same.json", "slow.json", "broken.json")]
    for path, record in zip(paths, (measured(0), measured(100), measured(200, slower=1.1)), strict=False):
        path.write_text(json.dumps(record.content))
    paths[3].write_text("{}")
    old, same, slow, broken = map(str, paths)
    limits = ["--fail-if", "p95>+5%", "--fail-if", "sentences_per_s<-5%"]
    assert main(["compare", old, same, *limits]) == 0
    assert main(["compare", old, slow]) == 0  # nothing was forbidden
    assert main(["compare", old, slow, *limits]) == 1
    output = capsys.readouterr()
    assert output.out.count("FAILED") == 2
    assert "2 of the figures compared tripped a condition" in output.err
    assert main(["compare", old, slow, "--fail-if", "p95>fast"]) == 2
    assert main(["compare", old, slow, "--fail-if", "no_such_metric>1"]) == 2
    assert main(["compare", old, broken]) == 1
    with pytest.raises(SystemExit) as stopped:
        main(["compare", old])
    assert stopped.value.code == 2
