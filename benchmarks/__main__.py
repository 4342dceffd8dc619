"""``python -m benchmarks`` from a checkout, installed or not; ``m3e bench`` is the same command."""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT / name) for name in ("benchmarks", "export", "runtime")]

from m3e_bench.cli import main  # noqa: E402  (found only now)

if __name__ == "__main__":
    sys.exit(main(prog="python -m benchmarks"))
