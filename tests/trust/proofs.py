"""Figures that a test measures: it is run in a process of its own and says what came out.

The test reports with pytest's ``record_property``, by the goal's id, and takes its number of cases from the fixture
``cases``, which is what ``--cases`` sets. A test that is skipped, or says nothing, has proven nothing.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tests.trust import Figure, Outcome
from tests.trust.goals import GOALS

_ROOT = Path(__file__).parents[2]


class Case(NamedTuple):
    """What became of a test, by JUnit's report.

    Attributes:
        reports: What it measured, by goal.
        problem: Why it did not pass, in a line; empty if it passed.
    """

    reports: dict[str, str]
    problem: str


@functools.cache
def run(tests: tuple[str, ...], count: int) -> list[Case]:
    """Run tests, whatever their tier; the problem of a run in which there were none is pytest's last line."""
    cases = () if count == 1 else ("--cases", str(count))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "", "--timeout", "0", "-p", "no:cacheprovider",
             "-o", "junit_family=xunit1", "--junitxml", str(report), *cases, *tests],
            cwd=_ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = [_case(each) for each in ElementTree.parse(report).iter("testcase")] if report.exists() else []
    if not found or (done.returncode and not any(case.problem for case in found)):
        found.append(Case({}, ((done.stdout + done.stderr).strip().splitlines() or ["no output"])[-1]))
    return found


def _case(element: ElementTree.Element) -> Case:
    reports = {each.attrib["name"]: each.attrib["value"] for each in element.iter("property")}
    bad = next((each for kind in ("failure", "error", "skipped") for each in element.iter(kind)), None)
    message = "" if bad is None else bad.get("message", "").strip() or bad.tag
    return Case(reports, message.partition("\n")[0][:200])


def measure(goal: str, tests: tuple[str, ...], count: int) -> Outcome:
    """What the tests report for a goal. A test that ends badly without a report counts against every goal."""
    mine = [case for case in run(tests, count) if goal in case.reports or (case.problem and not case.reports)]
    said = list(dict.fromkeys(case.reports[goal] for case in mine if goal in case.reports))
    problems = [case.problem for case in mine if case.problem]
    measured = "; ".join([*said, *problems]) or "the tests reported nothing"
    return Outcome(measured, bool(said) and not problems, {})


def figures() -> list[Figure]:
    """The goals that tests prove."""
    return [
        Figure(
            goal.id, goal.name, goal.goal, functools.partial(measure, goal.id, goal.proof.tests),
            goal.proof.quick, goal.proof.long, goal.proof.soak,
        )
        for goal in GOALS if goal.proof is not None
    ]  # fmt: skip
