"""Write the README's table from the committed record; ``--check`` fails where the two differ."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from benchmarks.cold_start import RECORD

README = Path(__file__).parents[1] / "README.md"
_TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)


def table() -> str:
    """Lay the record out as Markdown: medians over the runs."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    lines = [
        "| shape | graph | file | `import m3e` | process start to first vector | resident memory after it |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        imported, first, resident = (
            statistics.median(row[key]) for key in ("import_s", "first_vector_s", "resident_mb")
        )
        lines.append(
            f"| {row['shape']} | {row['precision']} | {row['file_mb']:.0f} MB | {imported:.2f} s | {first:.2f} s "
            f"| {resident:.0f} MB |"
        )
    machine = record["machine"]
    runs = len(record["rows"][0]["first_vector_s"])
    lines += [
        "",
        f"Medians of {runs} processes on {machine['threads']} cores of an {machine['cpu']}, onnxruntime "
        f"{machine['onnxruntime']}; random weights of M3E's shapes. Record: "
        f"[benchmarks/results/{RECORD.name}](benchmarks/results/{RECORD.name}); `make bench` measures again.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or check; the exit code is returned."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where the README is stale")
    parsed = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    expected = _TABLE.sub(lambda match: match[1] + table() + match[2], text)
    if parsed.check and expected != text:
        print("README.md does not show the record's figures; run: python -m benchmarks.readme", file=sys.stderr)
        return 1
    if not parsed.check:
        README.write_text(expected, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
