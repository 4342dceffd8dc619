"""The publishing of a bundle, ended or failed at every file operation and at random moments.

A failpoint is an audit event of Python (PEP 578): before it opens, makes, renames or removes anything, Python tells a
hook, which here counts and, at the count that was asked for, kills the process or raises the system's error. What
raises no event (fsync, the swap of two names) is wrapped. Each case runs in a forked child, so that the kill is a real
one and the hook goes with it.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from m3e.bundle import Bundle
from m3e.errors import BundleError, ExportError
from m3e.manifest import File, Manifest
from m3e_export import publish
from m3e_export.layout import write
from m3e_export.publish import check_target, staged

_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "wrapped"}
FAULTS: dict[str, int | None] = {"SIGKILL": None, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
# How a child that was not killed ended.
PUBLISHED, UNREACHED, REFUSED, FAILED = range(10, 14)

Publisher = Callable[[dict[str, bytes], Path], None]


def publish_files(files: dict[str, bytes], target: Path) -> None:
    """Publish a bundle that is in memory, as the exporter does with ``--force``."""
    check_target(target, force=True)
    with staged(target, sum(map(len, files.values()))) as folder:
        for name, data in files.items():
            write(folder / name, data)


def publish_in_place(files: dict[str, bytes], target: Path) -> None:
    """The negative control: an exporter that writes where the bundle is to be."""
    try:
        shutil.rmtree(target, ignore_errors=True)
        for name, data in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
    except OSError as error:
        raise ExportError(str(error)) from error


def bundle_of(tiny_bundle: Path, word: bytes) -> dict[str, bytes]:
    """A small bundle that says one word in every file, so that files of two of them would not go together."""
    manifest = Manifest.from_bytes((tiny_bundle / "manifest.json").read_bytes())
    names = ["config.json", "tokenizer.json", "1_Pooling/config.json", *(graph.file for graph in manifest.graphs)]
    files = dict.fromkeys(names, word * 100)
    listed = {name: File(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    return files | {"manifest.json": dataclasses.replace(manifest, files=listed).to_bytes()}


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder; none where there is no folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at_every_operation(
    old: dict[str, bytes] | None,
    new: dict[str, bytes],
    folder: Path,
    *,
    fault: str,
    exchange: bool = True,
    step: int = 1,
    publisher: Publisher = publish_files,
) -> tuple[int, list[str]]:
    """Publish again and again, with the fault at the first file operation, the second, and so on until none is left.

    Args:
        old: The bundle that is there before; None for none.
        new: The bundle that is published.
        folder: An empty folder to work in.
        fault: Of `FAULTS`.
        exchange: Whether the system can swap two names. Where it cannot, there is no bundle for a moment, and what has
            to hold is that the next export brings one back.
        step: Try every so many-th operation.
        publisher: What is attacked.

    Returns:
        How many cases ran, and a line for each that broke the promise.
    """
    target, failures, count = folder / "bundle", [], 0
    while True:
        lay_out(old, folder, target)
        attempt = functools.partial(_publish_with_fault, publisher, new, target, count * step, fault, exchange)
        status = _in_child(attempt)
        if status == UNREACHED:
            break
        if found := problem(status, old, new, target, exchange):
            failures.append(f"{fault} at operation {count * step}: {found}")
        count += 1
    if contents(folder) != {f"bundle/{name}": data for name, data in new.items()}:
        failures.append("without a fault, the new bundle is not all that is there")
    return count, failures


def at_random_moments(
    old: dict[str, bytes],
    new: dict[str, bytes],
    folder: Path,
    n_kills: int,
    *,
    seed: int = 0,
    publisher: Publisher = publish_files,
) -> list[str]:
    """Kill a process that publishes the two bundles in turn, after a random time; a line for each broken promise."""
    rng, target, failures = random.Random(seed), folder / "bundle", []
    lay_out(old, folder, target)
    for i in range(n_kills):
        pid = os.fork()
        if pid == 0:
            while True:
                publisher(new, target)
                publisher(old, target)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if problem := _after(old, new, target):
            failures.append(f"kill {i}: {problem}")
    return failures


def lay_out(old: dict[str, bytes] | None, folder: Path, target: Path) -> None:
    """Make the folder anew, with nothing but the older bundle in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in (old or {}).items():
        write_file(target / name, data)


def write_file(path: Path, data: bytes) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def problem(
    status: int, old: dict[str, bytes] | None, new: dict[str, bytes], target: Path, exchange: bool
) -> str | None:
    """What broke the promise, given how the publishing process ended; None if nothing did."""
    if status == FAILED:
        return "it raised something else than ExportError"
    if status == PUBLISHED and contents(target) != new:
        return "it ended well, and the bundle is not the new one"
    if status == REFUSED and contents(target) != (old or {}):
        return "it said that nothing was published, and the bundle is not the older one"
    if not exchange and old is not None and not target.exists():
        try:
            with staged(target, 0):
                raise ExportError("the next export fails as well")
        except ExportError:
            pass
        if contents(target) != old:
            return "the next export does not bring the older bundle back"
    return _after(old, new, target)


def _after(old: dict[str, bytes] | None, new: dict[str, bytes], target: Path) -> str | None:
    """What is wrong with the bundle that is there, or with the next export; None if nothing is."""
    if contents(target) not in (old or {}, new):
        return "the bundle is neither the older nor the newer one"
    if target.exists():
        try:
            Bundle(target).verify()
        except BundleError as error:
            return f"the bundle is refused: {error}"
    try:
        with mock.patch("os.fsync"):
            publish_files(new, target)
    except ExportError as error:
        return f"the next export fails: {error}"
    if list(target.parent.iterdir()) != [target] or contents(target) != new:
        return "the next export leaves something behind"
    return None


def _in_child(function: Callable[[], int]) -> int:
    """Call a function in a forked child: its result, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        os._exit(function())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _publish_with_fault(
    publisher: Publisher, files: dict[str, bytes], target: Path, at: int, fault: str, exchange: bool
) -> int:
    operations, armed = 0, True

    def strike(event: str, _: Any = None) -> None:
        nonlocal operations
        if not armed or event not in _EVENTS:
            return
        operations += 1
        if operations - 1 == at:
            number = FAULTS[fault]
            if number is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise OSError(number, os.strerror(number))

    swap = publish._exchange

    def failing_sync(fd: object) -> None:
        strike("wrapped")  # and no more: what a process has written outlives its kill without

    def failing_swap(a: Path, b: Path) -> bool:
        strike("wrapped")
        return exchange and swap(a, b)

    os.fsync, publish._exchange = failing_sync, failing_swap
    sys.addaudithook(strike)
    try:
        publisher(files, target)
        status = PUBLISHED
    except ExportError:
        status = REFUSED
    except BaseException:
        status = FAILED
    armed = False
    return status if operations > at else UNREACHED
