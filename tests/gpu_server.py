"""The server with a card that is not there; run by the tests, known to nothing else.

With ``worker`` as its first argument it is the inference process.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from tests.gpu_standin import put_in_place

if __name__ == "__main__":
    from m3e.server import run, worker

    if sys.argv[1] == "worker":
        put_in_place(pytest.MonkeyPatch())
        worker.main(arguments=sys.argv[2:])
    else:
        from m3e.cli.main import main

        run.serve = partial(run.serve, worker_command=(sys.executable, str(Path(__file__)), "worker"))
        raise SystemExit(main(["serve", *sys.argv[1:]]))
