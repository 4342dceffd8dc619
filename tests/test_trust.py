"""Every figure of every harness, tier by tier: its goal is met and its negative controls are caught."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.trust import TIERS, Figure, Tier, figures, proofs, supply
from tests.trust.goals import GOALS

MARKS: dict[Tier, list[pytest.MarkDecorator]] = {
    "quick": [],
    "long": [pytest.mark.long, pytest.mark.timeout(3000)],
    "soak": [pytest.mark.soak, pytest.mark.timeout(0)],
}


@pytest.mark.checkout
@pytest.mark.parametrize(
    ("figure", "tier"),
    [
        pytest.param(figure, tier, marks=MARKS[tier], id=f"{figure.id}-{tier}")
        for tier in TIERS
        for figure in figures()
        if figure.count(tier)
    ],
)
def test_a_goal_is_met_and_the_controls_are_caught(figure: Figure, tier: Tier) -> None:
    outcome = figure.measure(figure.count(tier))
    assert outcome.passed, f"{figure.name}: {outcome.measured}, goal {figure.goal}"
    assert outcome.caught, "a harness without a negative control proves nothing"
    assert all(outcome.caught.values()), f"got away: {[name for name, caught in outcome.caught.items() if not caught]}"


def test_ids_are_unique_and_every_goal_but_the_gpus_is_measured() -> None:
    ids = [figure.id for figure in (*figures(), *proofs.figures())]
    assert len(set(ids)) == len(ids), ids
    measured = {id_.rstrip("bcdefghijklmnopqrstuvwxyz") for id_ in ids}
    assert [goal.id for goal in GOALS if goal.id not in measured and not {*goal.within} & {*ids}] == ["B4", "F7"]


def test_what_tests_prove(tmp_path: Path) -> None:
    """These four run in processes of their own, as those of the goals do."""
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "def test_fine(record_property):\n    record_property('X1', '3 of 3')\n"
        "def test_bad(record_property):\n    record_property('X1', '2 of 3')\n    assert 2 == 3, 'too few'\n"
        "def test_silent():\n    pass\n"
        "def test_skipped():\n    pytest.skip('no time')\n"
    )
    names = ("fine", "bad", "silent", "skipped")
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(lambda name: proofs.measure("X1", (f"{file}::test_{name}",), 1), names)
        found = dict(zip(names, outcomes, strict=True))
    assert {name for name, outcome in found.items() if outcome.passed} == {"fine"}
    assert found["fine"].measured == "3 of 3"
    assert found["bad"].measured.startswith("2 of 3; AssertionError: too few")
    assert found["silent"].measured == "the tests reported nothing"
    assert "no time" in found["skipped"].measured
    assert not proofs.measure("X1", (f"{file}::test_gone",), 1).passed


def test_an_audit_without_a_service_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody listens
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert supply.main() == 2
    assert "NOT AUDITED: no vulnerability service could be asked (osv: " in capsys.readouterr().out
