"""A folder appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from m3e.bundle import SIDE_NAME
from m3e.errors import ExportError
from m3e.manifest import MANIFEST_NAME

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h
_OLDER = "-older"


def check_target(target: Path, force: bool) -> None:
    """Refuse a target that must not be replaced.

    Args:
        target: Where the bundle is to be.
        force: Whether an older bundle there may be replaced. Nothing but a bundle or an empty folder ever is.

    Raises:
        ExportError: The target exists and may not be replaced.
    """
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise ExportError(f"{str(target)!r} exists and is no folder; choose another -o")
    try:
        is_empty = not any(target.iterdir())
    except OSError as error:
        raise ExportError(f"{str(target)!r} cannot be read: {error}; choose another -o") from error
    if not is_empty:
        if not _is_bundle(target):
            raise ExportError(
                f"{str(target)!r} holds other files than a bundle's and is never replaced; remove it yourself, or "
                "choose another -o"
            )
        if not force:
            raise ExportError(f"{str(target)!r} already holds a bundle; --force replaces it")


@contextlib.contextmanager
def staged(target: Path, needed_bytes: int) -> Iterator[Path]:
    """Give a folder beside the target to write into; publish it under the target's name when the block ends well.

    When the block raises, the folder is removed and the target is as it was. A process that dies leaves a
    ``.NAME.tmp-PID-...`` folder, which the next export of the same name removes; or puts back, if the process died
    where the system cannot swap two names, between taking the older bundle away and putting the newer in its place.

    Args:
        target: The final name. Its parent is made if it is missing.
        needed_bytes: What will be written, to refuse early on a full disk.

    Yields:
        An empty folder on the target's file system.

    Raises:
        ExportError: The disk is full or a file cannot be written.
    """
    parent = target.absolute().parent
    staging = parent / f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent, target.name)
        free = shutil.disk_usage(parent).free
        if free < needed_bytes:
            raise ExportError(
                f"{str(parent)!r} has {free / 1e6:.0f} MB free and the bundle needs about {needed_bytes / 1e6:.0f} MB; "
                "free some space or choose another -o"
            )
        staging.mkdir()
        yield staging
        _sync(staging)
        _move_into_place(staging, target.absolute())
        with contextlib.suppress(OSError):  # published; a file system that cannot sync a folder is no failure
            _sync_one(parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(
                f"the disk of {str(parent)!r} is full; nothing was published. Free about {needed_bytes / 1e6:.0f} MB "
                "or choose another -o"
            ) from error
        raise ExportError(f"cannot write {str(target)!r}: {error}; nothing was published") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_bundle(folder: Path) -> bool:
    """Whether a manifest of ours accounts for every file; other programs write a manifest.json too."""
    try:
        content = json.loads((folder / MANIFEST_NAME).read_bytes())
        declared = {MANIFEST_NAME, SIDE_NAME, *content["files"]}
        files = [path for path in folder.rglob("*") if not path.is_dir()]
        return "format_version" in content and all(path.relative_to(folder).as_posix() in declared for path in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove_leftovers(parent: Path, name: str) -> None:
    prefix = f".{name}.tmp-"
    for path in parent.iterdir():  # no glob: the name may hold brackets
        pid = path.name.removeprefix(prefix).split("-")[0]
        if path.name.startswith(prefix) and pid.isdecimal() and not _is_running(int(pid)):
            if path.name.endswith(_OLDER) and not (parent / name).exists():
                path.rename(parent / name)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
    elif _exchange(staging, target):
        shutil.rmtree(staging, ignore_errors=True)  # now the older bundle
    else:  # no exchange on this system: for a moment there is no target
        older = staging.with_name(f"{staging.name}{_OLDER}")
        target.rename(older)
        try:
            staging.rename(target)
        except OSError:
            older.rename(target)
            raise
        shutil.rmtree(older, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step (renameat2(2), Linux); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)
