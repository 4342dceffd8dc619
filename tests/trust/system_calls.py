"""Publishing, with every system call on files struck in turn by strace: what Python's hooks do not see is struck too.

The failpoints of `tests.trust.kills` are Python's own audit events. This checks them from outside: strace stops the
publishing process at the N-th call of a name and kills it or fails the call, whatever in Python or C made it.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from m3e.errors import ExportError
from tests.trust import Figure, Outcome
from tests.trust.artefacts import summary, working_folder
from tests.trust.kills import (
    FAILED,
    FAULTS,
    PUBLISHED,
    REFUSED,
    UNREACHED,
    Publisher,
    bundle_of,
    lay_out,
    problem,
    publish_files,
    publish_in_place,
)
from tests.trust.models import tiny_bundle

# What changes files and folders; one that a platform does not have is never made.
CALLS = ("openat", "write", "fsync", "mkdir", "rename", "renameat2", "unlink", "unlinkat", "rmdir")
_ATTACH_TIMEOUT_S = 30.0


def at_every_call(
    old: dict[str, bytes] | None,
    new: dict[str, bytes],
    folder: Path,
    *,
    fault: str,
    publisher: Publisher = publish_files,
) -> tuple[int, list[str]]:
    """Publish again and again, with the fault at the first call of each name, the second, and so on.

    Returns:
        How many cases ran, and a line for each that broke the promise.
    """
    target, count = folder / "bundle", 0
    failures: list[str] = []
    for name in CALLS:
        for n in itertools.count(1):
            lay_out(old, folder, target)
            status = _publish_under_strace(publisher, new, target, name, n, fault)
            if status == UNREACHED:
                break
            count += 1
            if found := problem(status, old, new, target, exchange=True):
                failures.append(f"{fault} at {name} {n}: {found}")
    return count, failures


def _publish_under_strace(
    publisher: Publisher, files: dict[str, bytes], target: Path, name: str, n: int, fault: str
) -> int:
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            publisher(files, target)
            status = PUBLISHED
        except ExportError:
            status = REFUSED
        except BaseException:
            status = FAILED
        os._exit(status)
    os.waitpid(pid, os.WUNTRACED)
    strike = "signal=KILL" if FAULTS[fault] is None else f"error={fault}"
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
        tracer = subprocess.Popen(
            ["strace", "-qq", "-o", log.name, "-e", f"trace={name}", "-e", f"inject={name}:{strike}:when={n}",
             "-p", str(pid)],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            _wait_until_traced(pid, tracer)
        finally:
            os.kill(pid, signal.SIGCONT)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            tracer.communicate()
        if status >= 0 and "(INJECTED)" not in log.read():
            return UNREACHED
    return status


def _wait_until_traced(pid: int, tracer: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _ATTACH_TIMEOUT_S
    while not re.search(r"TracerPid:\t[1-9]", Path(f"/proc/{pid}/status").read_text(encoding="ascii")):
        if tracer.poll() is not None or time.monotonic() > deadline:
            said = tracer.stderr.read() if tracer.poll() is not None and tracer.stderr else "no answer"
            raise RuntimeError(f"strace may not trace a process here: {said.strip()}")
        time.sleep(0.001)


def measure(faults: tuple[str, ...], _: int) -> Outcome:
    """Every call, with a bundle that was there before and without one."""
    assert shutil.which("strace"), "this figure needs strace: apt-get install strace"
    old, new = (bundle_of(tiny_bundle(), word) for word in (b"older", b"newer"))
    count, caught = 0, {}
    failures: list[str] = []
    with working_folder() as folder:
        for fault in faults:
            for before in (None, old):
                n, found = at_every_call(before, new, folder, fault=fault)
                count, failures = count + n, failures + found
            n, found = at_every_call(old, new, folder, fault=fault, publisher=publish_in_place)
            caught[f"an exporter that writes in place, {fault}"] = len(found) > n // 4
    return Outcome(summary(failures, count), count > 0 and not failures, caught)


def _kills(count: int) -> Outcome:
    return measure(("SIGKILL",), count)


def _errors(count: int) -> Outcome:
    return measure(("ENOSPC", "EIO"), count)


FIGURES = (
    Figure("E1b", "exports killed by strace at every system call on files: neither bundle", "0", _kills, long=1),
    Figure("E2b", "ENOSPC and EIO by strace at every such call: target touched", "0", _errors, long=1),
)
