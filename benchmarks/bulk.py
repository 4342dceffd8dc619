"""m3e embed against Encoder.encode on the same short rows, and what it means for ten million.

m3e-small's shape with random weights, INT8, generated Chinese texts of 4 to 16 characters. The command runs in a
process of its own. At every n-th commit it is stopped (SIGSTOP), `encode` gets the very rows of that part, and it
goes on (SIGCONT): both rates come from the same minutes of the machine, and the seconds of the stop are not the
command's. Its resident memory is sampled against the rows done. Time per commit and memory lie on straight lines,
which is the evidence for ten million rows. Writes ``benchmarks/results/bulk.json``.

  python -m benchmarks.bulk                       # the record: 819,200 rows, 12 minutes at 1,700 a second
  python -m benchmarks.bulk --rows 65536 --rows-per-part 4096 --output /dev/null
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import m3e
from benchmarks.checkpoints import write_checkpoint
from m3e import Encoder
from m3e_bench.machine import describe_code, describe_machine
from m3e_export.pipeline import convert

RECORD = Path(__file__).parent / "results" / "bulk.json"
TARGET_ROWS = 10_000_000
_COMMAND = "from m3e.cli.main import main; raise SystemExit(main())"
_POLL_S = 0.02
_PERCENTS = (1, 2, 5, *range(10, 101, 10))


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


class Job:
    """``m3e embed`` in a process; time is counted only while it may run.

    Attributes:
        commits: (seconds, rows) of each commit.
        resident: (rows committed, bytes resident) of each look.
    """

    def __init__(self, bundle: Path, rows: Path, output: Path, rows_per_part: int) -> None:
        command = [sys.executable, "-c", _COMMAND, "embed", str(rows), "-o", str(output), "--bundle", str(bundle),
                   "--keep", "id:int", "--rows-per-part", str(rows_per_part)]  # fmt: skip
        roots = os.pathsep.join([str(Path(m3e.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self.commits: list[tuple[float, int]] = []
        self.resident: list[tuple[int, int]] = []
        self._state = output / "_m3e.json"
        self._stopped_s = 0.0
        self._started = time.perf_counter()
        self._process = psutil.Popen(command, env=os.environ | {"PYTHONPATH": roots}, stdout=subprocess.DEVNULL)

    def wait_for_commit(self) -> bool:
        """Wait until there are more rows than before; False when the job has ended."""
        done = self.commits[-1][1] if self.commits else 0
        while self._process.poll() is None:
            try:
                rows = json.loads(self._state.read_bytes())["rows"] if self._state.exists() else 0
                self.resident.append((rows, self._process.memory_info().rss))
            except psutil.Error:  # it has just ended
                continue
            if rows > done:
                self.commits.append((time.perf_counter() - self._started - self._stopped_s, rows))
                return True
            time.sleep(_POLL_S)
        if self._process.returncode:
            raise SystemExit(f"m3e embed ended with {self._process.returncode}")
        return False

    def stop(self) -> None:
        """Stop the process; it keeps its memory."""
        self._process.suspend()
        self._stopped_at = time.perf_counter()

    def go_on(self) -> None:
        """Let it run again."""
        self._stopped_s += time.perf_counter() - self._stopped_at
        self._process.resume()

    def kill(self) -> None:
        """End it, running or stopped."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def measure(bundle: Path, folder: Path, n_rows: int, rows_per_part: int, every: int) -> dict[str, Any]:
    """Run the job and, at every n-th commit, `encode` on the rows just committed."""
    texts = write_rows(folder / "rows.jsonl", n_rows)
    encoder = Encoder(bundle)
    encoder.encode(texts[:2048], show_progress_bar=False)  # warm
    load = os.getloadavg()[0]  # what else the machine was doing: the ratio holds then, the rates do not
    pairs: list[tuple[float, float]] = []
    job = Job(bundle, folder / "rows.jsonl", folder / "out", rows_per_part)
    try:
        while job.wait_for_commit():
            if len(job.commits) > 1 and len(job.commits) % every == 0:
                (before, first), (at, last) = job.commits[-2:]
                job.stop()
                started = time.perf_counter()
                encoder.encode(texts[first:last], show_progress_bar=False)
                own = time.perf_counter() - started
                job.go_on()
                pairs.append(((last - first) / (at - before), (last - first) / own))
    finally:
        job.kill()
    record = {"rows": n_rows, "rows_per_part": rows_per_part, "precision": encoder.precision, "load_average": load}
    return record | rates(pairs) | time_line(job.commits) | memory(job.resident, n_rows)


def rates(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Rows/s of both on the same parts."""
    embed, encode = np.array(pairs).T
    ratios = embed / encode
    return {
        "encode_rows_per_s": float(np.median(encode)),
        "embed_rows_per_s": float(np.median(embed)),
        "embed_of_encode": {
            "median": float(np.median(ratios)),
            # All rows of the parts over all their seconds: no part weighs more for being slow.
            "of_sums": float((1 / encode).sum() / (1 / embed).sum()),
            "low": float(ratios.min()),
            "high": float(ratios.max()),
            "parts": len(ratios),
        },
        "rates": [[round(a, 1), round(b, 1)] for a, b in pairs],
    }


def time_line(commits: list[tuple[float, int]]) -> dict[str, Any]:
    """The line through the commits, how far they are from it, and where it leads."""
    at, rows = np.array(commits).T
    per_row, start = np.polyfit(rows, at, 1)
    half = len(commits) // 2
    slopes = [float(np.polyfit(rows[part], at[part], 1)[0]) for part in (slice(0, half + 1), slice(half, None))]
    return {
        "seconds": float(at[-1]),
        "start_s": float(start),
        "rows_per_s_of_the_line": float(1 / per_row),
        "second_half_of_first": slopes[1] / slopes[0],
        "largest_distance_from_the_line_s": float(np.abs(at - (per_row * rows + start)).max()),
        "hours_for_10_million_rows": float((start + per_row * TARGET_ROWS) / 3600),
        "commits": [[round(float(second), 2), int(row)] for second, row in commits],
    }


def memory(resident: list[tuple[int, int]], n_rows: int) -> dict[str, Any]:
    """Mean and peak of the resident memory up to each of the percents, from the one before; and how it moved."""
    # Until the first commit it still loads, and after the last one it gives its memory back.
    samples = np.array([(100 * rows / n_rows, size / 1e6) for rows, size in resident if 0 < rows < n_rows])
    line: dict[int, dict[str, float]] = {}
    for before, percent in zip((0, *_PERCENTS), _PERCENTS, strict=False):
        there = samples[(samples[:, 0] > before) & (samples[:, 0] <= percent), 1]
        if len(there):
            line[percent] = {"mean_mb": round(float(there.mean()), 1), "peak_mb": round(float(there.max()), 1)}
    means = [values["mean_mb"] for values in line.values()]
    per_percent = float(np.polyfit(samples[:, 0], samples[:, 1], 1)[0])
    return {
        "resident_mb": line,
        "resident_last_of_first": means[-1] / means[0],
        "resident_highest_of_first": max(means) / means[0],
        "resident_growth_mb_per_million_rows": per_percent * 100 / n_rows * 1e6,
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bulk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100 * 8192, help="by default, a commit is 1 %% of them")
    parser.add_argument("--rows-per-part", type=int, default=8192, help="fewer than the command's own default: more "
                        "commits, which cost time")  # fmt: skip
    parser.add_argument("--every", type=int, default=4, metavar="N", help="commits from one turn of encode to the next")
    parser.add_argument("--bundle", type=Path, help="default: m3e-small's shape, made here")
    parser.add_argument("--output", type=Path, default=RECORD)
    parsed = parser.parse_args()
    if parsed.rows < 2 * parsed.every * parsed.rows_per_part:
        parser.error("--rows must be at least twice --every times --rows-per-part")
    created = datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = parsed.bundle or folder / "bundle"
        if parsed.bundle is None:
            convert(str(write_checkpoint(folder / "checkpoint", "small")), bundle, precisions=("fp32", "int8"),
                    accept_accuracy=True)  # fmt: skip
        record = {"created": created, "machine": describe_machine(), "code": describe_code()}
        record |= measure(bundle, folder, parsed.rows, parsed.rows_per_part, parsed.every)
    parsed.output.parent.mkdir(exist_ok=True)
    parsed.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in record.items() if key not in ("commits", "rates")}, indent=1))


if __name__ == "__main__":
    main()
