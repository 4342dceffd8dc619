"""Convert a checkpoint into a bundle; see ``--help``. Works from a checkout without installing it."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This checkout's own packages come first, also where another version is installed.
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "runtime")]
    from m3e_export.cli import main

    sys.exit(main())
