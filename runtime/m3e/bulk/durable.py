"""Bytes that are there after a crash: appended up to a known length, or under their name whole."""

from __future__ import annotations

import os
from pathlib import Path


class AppendedFile:
    """A file that only grows; whatever was written after the last commit is cut off when it is opened again.

    Args:
        path: Where it is; made if it is missing.
        size_bytes: Its length at the last commit.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        self._file.truncate(size_bytes)
        self._file.seek(size_bytes)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)

    def commit(self) -> int:
        """Bring everything to the disk and give the length."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def write_at_start(self, data: bytes) -> None:
        """Overwrite the first bytes, and bring that to the disk."""
        self._file.seek(0)
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def publish(temporary: Path, path: Path) -> None:
    """Bring a finished file to the disk and give it its name, replacing what has it."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)  # noqa: PTH105 (the tests make it fail)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
