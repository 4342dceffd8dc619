"""m3e embed against Encoder.encode on the same short rows, and what it means for ten million.

m3e-small's shape with random weights, INT8, generated Chinese texts of 4 to 16 characters. The command runs as a
process of its own; its resident memory is sampled while it works. Every chunk of rows costs the same and memory does
not grow, which is the evidence for the extrapolation: time per commit is a straight line. Writes
``benchmarks/results/bulk.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import m3e
from benchmarks.checkpoints import write_checkpoint
from m3e import Encoder
from m3e_bench.machine import describe_machine
from m3e_export.pipeline import convert

RECORD = Path(__file__).parent / "results" / "bulk.json"
TARGET_ROWS = 10_000_000
_COMMAND = "from m3e.cli.main import main; raise SystemExit(main())"


def write_rows(path: Path, n_rows: int) -> list[str]:
    """Write JSON lines and give the texts."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 17, n_rows)
    characters = rng.integers(0x4E00, 0x5E00, lengths.sum())
    ends = np.cumsum(lengths)
    texts = ["".join(map(chr, characters[end - length : end])) for end, length in zip(ends, lengths, strict=True)]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": i, "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(texts))
    return texts


def run_command(bundle: Path, rows: Path, output: Path, rows_per_part: int) -> dict[str, Any]:
    """Embed in a process; sample its memory, and the rows it has committed, ten times a second."""
    command = [sys.executable, "-c", _COMMAND, "embed", str(rows), "-o", str(output), "--bundle", str(bundle), "--keep",
               "id:int", "--rows-per-part", str(rows_per_part)]  # fmt: skip
    roots = os.pathsep.join([str(Path(m3e.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    started = time.monotonic()
    process = psutil.Popen(command, env=os.environ | {"PYTHONPATH": roots}, stdout=subprocess.DEVNULL)
    samples: list[tuple[float, int, int]] = []
    while process.poll() is None:
        try:
            done = json.loads((output / "_m3e.json").read_text())["rows"]
            samples.append((time.monotonic() - started, process.memory_info().rss, done))
        except (OSError, ValueError, psutil.Error):
            pass
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"m3e embed ended with {process.returncode}")
    commits = [sample for before, sample in itertools.pairwise(samples) if sample[2] > before[2]]
    return {
        "seconds": time.monotonic() - started,
        "commits": [{"seconds": at, "rows": rows_done} for at, _, rows_done in commits],
        "resident_mb": [{"seconds": round(at, 2), "mb": rss / 1e6, "rows": done} for at, rss, done in samples[::5]],
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulk", description=__doc__)
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--rows-per-part", type=int, default=4096)
    parser.add_argument("--bundle", type=Path, help="default: m3e-small's shape, made here")
    parser.add_argument("--output", type=Path, default=RECORD)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = parsed.bundle or folder / "bundle"
        if parsed.bundle is None:
            convert(str(write_checkpoint(folder / "checkpoint", "small")), bundle, precisions=("fp32", "int8"),
                    accept_accuracy=True)  # fmt: skip
        texts = write_rows(folder / "rows.jsonl", parsed.rows)
        # The library's own speed, before and after, so that a machine that drifts shows.
        encoder, sample = Encoder(bundle), texts[: max(len(texts) // 4, 1024)]
        encoder.encode(sample[:2048])
        load = os.getloadavg()[0]  # what else the machine was doing: the ratio holds then, the rates do not
        own: list[float] = []

        def measure_own() -> None:
            started = time.perf_counter()
            encoder.encode(sample)
            own.append(len(sample) / (time.perf_counter() - started))

        measure_own()
        run = run_command(bundle, folder / "rows.jsonl", folder / "out", parsed.rows_per_part)
        measure_own()
        record = summarise(parsed.rows, parsed.rows_per_part, own, run)
        record |= {"machine": describe_machine(), "precision": encoder.precision, "load_average": load}
    parsed.output.parent.mkdir(exist_ok=True)
    parsed.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in record.items() if key not in ("commits", "resident_mb")}, indent=1))


def summarise(n_rows: int, rows_per_part: int, own: list[float], run: dict[str, Any]) -> dict[str, Any]:
    """Fit the line through the commits, compare rates, and find how memory moved."""
    at = np.array([commit["seconds"] for commit in run["commits"]])
    rows = np.array([commit["rows"] for commit in run["commits"]])
    per_row, start = np.polyfit(rows, at, 1)
    left_over = np.abs(at - (per_row * rows + start)).max()
    # After the first commit every buffer has its size.
    resident = np.array([sample["mb"] for sample in run["resident_mb"] if sample["rows"] > 0])
    return {
        "rows": n_rows,
        "rows_per_part": rows_per_part,
        "encode_rows_per_s": own,
        "embed_rows_per_s": 1 / per_row,
        "embed_of_encode": 1 / per_row / float(np.mean(own)),
        "start_s": start,
        "largest_distance_from_the_line_s": left_over,
        "resident_mb_first": float(resident[: max(1, len(resident) // 10)].mean()),
        "resident_mb_last": float(resident[-max(1, len(resident) // 10) :].mean()),
        "resident_mb_peak": float(resident.max()),
        "hours_for_10_million_rows": (start + per_row * TARGET_ROWS) / 3600,
        **run,
    }


if __name__ == "__main__":
    main()
