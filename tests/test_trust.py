"""Every figure of every harness, tier by tier: its goal is met and its negative controls are caught."""

from __future__ import annotations

import pytest

from tests.trust import TIERS, Figure, Tier, figures, supply

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


def test_ids_are_unique() -> None:
    ids = [figure.id for figure in figures()]
    assert len(set(ids)) == len(ids), ids


def test_an_audit_without_a_service_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody listens
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert supply.main() == 2
    assert "NOT AUDITED: no vulnerability service could be asked (osv: " in capsys.readouterr().out
