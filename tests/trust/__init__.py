"""Harnesses that attack what the project promises. One module a harness; each has a tuple ``FIGURES``.

A `Figure` is a row of the scoreboard: what is counted, the goal, how many cases each tier runs, and a function that
runs that many and says what came out. The function also runs its negative controls: broken stand-ins (an encoder that
leaks, a mask made from ids) that the very same check has to catch. A check that cannot fail proves nothing.

`harnesses` finds the modules by itself. ``tests/test_trust.py`` runs every figure at its tier's count and fails on a
missed goal or on a control that got away; ``python -m tests.scoreboard --run TIER`` runs them too and records the
outcome in ``scoreboard.json``, which ``python -m tests.scoreboard`` prints. What an ordinary test measures is a row
too, by `tests.trust.proofs`.

    def measure(count: int) -> Outcome:
        wrong = sum(attack(i) for i in counted(count))
        return Outcome(f"{wrong} of {count:,}", wrong == 0, {"leaking encoder": attack_leaking()})

    FIGURES = (Figure("D4", "open and close: growth of resident memory", "<= 8 MB", measure, quick=50, soak=10_000),)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from m3e.progress import progress_bar

# `make test`, `make test-long`, `make test-soak`: seconds, within an hour in all, hours.
Tier = Literal["quick", "long", "soak"]
TIERS: tuple[Tier, ...] = ("quick", "long", "soak")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a figure's function found.

    Attributes:
        measured: For people: the number with its unit, such as ``0 of 2,000``.
        passed: Whether the goal was met.
        caught: Each negative control by name, and whether the check caught it.
    """

    measured: str
    passed: bool
    caught: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the scoreboard.

    Attributes:
        id: As in ``goals.py``, such as ``A1``; a second figure of the same goal adds a letter, ``A3b``.
        name: What is counted.
        goal: The bound, for people; `measure` decides.
        measure: Runs so many cases.
        quick: Cases in `make test`; 0 where it takes more than seconds.
        long: Cases in `make test-long`; 0 where `quick` already runs them all.
        soak: Cases in `make test-soak`; 0 where another tier already runs them all.
    """

    id: str
    name: str
    goal: str
    measure: Callable[[int], Outcome]
    quick: int = 0
    long: int = 0
    soak: int = 0

    def count(self, tier: Tier) -> int:
        """How many cases a tier runs."""
        return {"quick": self.quick, "long": self.long, "soak": self.soak}[tier]


def harnesses() -> list[ModuleType]:
    """Every module of this package that has figures, by name."""
    found = (module.name for module in pkgutil.iter_modules(__path__, f"{__name__}."))
    names = sorted(name for name in found if name != f"{__name__}.guided")  # it needs atheris
    return [module for module in map(importlib.import_module, names) if hasattr(module, "FIGURES")]


def figures() -> list[Figure]:
    """The figures of every harness, by id."""
    found: list[Figure] = [figure for module in harnesses() for figure in module.FIGURES]
    return sorted(found, key=lambda figure: figure.id)


def counted(count: int) -> Iterator[int]:
    """Count from 0, with a progress bar on a terminal."""
    with progress_bar(count, "case") as progress:
        for i in range(count):
            yield i
            progress.update(1)
