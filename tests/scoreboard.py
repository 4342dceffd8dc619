"""``python -m tests.scoreboard``: every figure with its goal, what was measured, and when.

``--run quick``, ``long`` or ``soak`` measures a tier first and records it in ``tests/trust/scoreboard.json``; names
of figures behind it measure only those, ``--count`` another number of cases.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from m3e_bench.machine import describe_code, describe_machine
from tests.trust import TIERS, Figure, Tier, figures, proofs
from tests.trust.goals import GOALS, GROUPS

RECORD = Path(__file__).parent / "trust" / "scoreboard.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print the table; 1 if a figure missed its goal or a control got away."""
    parser = argparse.ArgumentParser(prog="python -m tests.scoreboard", description=__doc__)
    parser.add_argument("--run", choices=TIERS, help="measure a tier and record it")
    parser.add_argument("--count", type=int, help="cases, instead of the tier's")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help="such as A1; default: all of the tier")
    options = parser.parse_args(arguments)
    known = {figure.id: figure for figure in (*figures(), *proofs.figures())}
    unknown = set(options.figures) - known.keys()
    if unknown:
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.run:
        for figure in known.values():
            if figure.id in options.figures or (not options.figures and figure.count(options.run)):
                _measure(figure, options.run, options.count or figure.count(options.run))
    record = read()
    sys.stdout.write(table(record) + "\n")
    return int(any(not each["passed"] or not all(each["caught"].values()) for each in record.values()))


def read() -> dict[str, Any]:
    """The record: what was measured, by figure."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return found


def _measure(figure: Figure, tier: Tier, count: int) -> None:
    sys.stderr.write(f"{figure.id} {figure.name}: {count:,}\n")
    begin = time.monotonic()
    outcome = figure.measure(count)
    code = describe_code()
    record = read()
    record[figure.id] = {
        "measured": outcome.measured,
        "passed": outcome.passed,
        "caught": dict(outcome.caught),
        "count": count,
        "tier": tier,
        "seconds": round(time.monotonic() - begin),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": (code["commit"] or "")[:12] + ("+" if code["changed_files"] else ""),
        "machine": describe_machine()["cpu"],
    }
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def table(record: dict[str, Any]) -> str:
    """The scoreboard as text: each goal, beneath it what was measured."""
    rows: dict[str, list[Figure]] = {}
    for figure in (*figures(), *proofs.figures()):
        rows.setdefault(figure.id.rstrip("abcdefghijklmnopqrstuvwxyz"), []).append(figure)
    known = {figure.id: figure for found in rows.values() for figure in found}
    controls = [caught for each in record.values() for caught in each["caught"].values()]
    lines: list[str] = []
    for goal in GOALS:
        if goal.id[1:] == "1":
            lines += ["", GROUPS[goal.id[0]]]
        lines.append(f"  {goal.id:<4} {goal.name}: {goal.goal}")
        if goal.id == "F7":
            lines.append(
                f"       {'pass' if all(controls) else 'FAIL'}  controls caught {sum(controls)}/{len(controls)}"
            )
            continue
        for figure in (*rows.get(goal.id, []), *(known[id_] for id_ in goal.within)):
            lines.append(_measured(figure, record.get(figure.id)))
        if goal.id not in rows and not goal.within:
            lines.append("       not measured")
    return "\n".join(lines[1:])


def _measured(figure: Figure, found: dict[str, Any] | None) -> str:
    if found is None:
        return f"       not measured  {figure.name}"
    caught = found["caught"].values()
    passed = found["passed"] and all(caught)
    controls = f"; controls caught {sum(caught)}/{len(caught)}" if caught else ""
    return (
        f"       {'pass' if passed else 'FAIL'}  {figure.id}: {found['measured']}{controls}; "
        f"{found['date']}, {found['tier']}, {found['seconds']} s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
