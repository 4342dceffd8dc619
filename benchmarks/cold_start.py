"""Process start to first vector, and the memory that it leaves, each run a new process.

M3E's shapes with random weights, which are as large and as slow as trained ones. Writes
``benchmarks/results/cold_start.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import write_checkpoint
from m3e.cpu import available_threads
from m3e.progress import progress_bar
from m3e_export.pipeline import convert

RECORD = Path(__file__).parent / "results" / "cold_start.json"

# The child reports wall time since the parent started it, so the interpreter's own start is inside.
_CHILD = """
import time, sys
started = float(sys.argv[1])
import m3e
imported = time.time()
encoder = m3e.Encoder(sys.argv[2], precision=sys.argv[3])
opened = time.time()
encoder.encode("今天天气真好，我们去公园。")
first = time.time()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(imported - started, first - started, status["VmRSS"].split()[0], status["VmHWM"].split()[0])
"""


def measure(bundle: Path, precision: str, runs: int) -> dict[str, Any]:
    """Start a process ``runs`` times after one start that warms the file cache, and keep every sample."""
    samples: list[list[float]] = []
    with progress_bar(runs + 1, "run") as progress:
        for _ in range(runs + 1):
            command = [sys.executable, "-c", _CHILD, repr(time.time()), str(bundle), precision]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            samples.append([float(value) for value in done.stdout.split()])
            progress.update(1)
    imported, first, resident, peak = zip(*samples[1:], strict=True)
    return {
        "import_s": list(imported),
        "first_vector_s": list(first),
        "resident_mb": [kilobytes * 1024 / 1e6 for kilobytes in resident],
        "peak_mb": [kilobytes * 1024 / 1e6 for kilobytes in peak],
    }


def machine() -> dict[str, Any]:
    """Say what the figures were measured on."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "threads": available_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("m3e-runtime", "onnxruntime", "tokenizers", "numpy")},
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["small", "base"], choices=["small", "base", "large"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"], choices=["fp32", "int8"])
    parser.add_argument("--runs", type=int, default=9)
    parsed = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in parsed.shapes:
            checkpoint = write_checkpoint(Path(folder) / f"m3e-{shape}", shape)
            print(f"converting the m3e-{shape} shape", file=sys.stderr)
            manifest = convert(str(checkpoint), Path(folder) / "bundles" / shape, precisions=parsed.precisions)
            for graph in manifest.graphs:
                samples = measure(Path(folder) / "bundles" / shape, graph.precision, parsed.runs)
                file_mb = manifest.files[graph.file].size_bytes / 1e6
                rows.append({"shape": f"m3e-{shape}", "precision": graph.precision, "file_mb": file_mb, **samples})
                print(
                    f"m3e-{shape} {graph.precision}: first vector after "
                    f"{statistics.median(samples['first_vector_s']):.2f} s, "
                    f"{statistics.median(samples['resident_mb']):.0f} MB"
                )
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
