"""A server whose inference process is one of the tests' own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial


def serve(script: str, be_worker: Callable[[list[str]], None]) -> int:
    """Be ``m3e serve`` with that script's process for inference; with ``worker`` as first argument, be that process.

    Args:
        script: The file that calls this.
        be_worker: Takes the arguments of `m3e.server.worker.main`.

    Returns:
        The exit code.
    """
    from m3e.cli.main import main
    from m3e.server import run

    if sys.argv[1] == "worker":
        be_worker(sys.argv[2:])
        return 0
    run.serve = partial(run.serve, worker_command=(sys.executable, script, "worker"))
    return main(["serve", *sys.argv[1:]])
