"""A bundle's files, damaged one byte or one end at a time: whatever loads it has to refuse and to name the file."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from m3e.bundle import Bundle
from m3e.errors import BundleError

Load = Callable[[Path], object]


def verify(folder: Path) -> None:
    """Load every byte of a bundle, as ``m3e verify`` and a server's start do."""
    Bundle(folder).verify()


def without_hashes(folder: Path) -> None:
    """The negative control: a loader that looks at names and sizes alone."""
    Bundle(folder)


def flip(folder: Path, n_positions: int, *, load: Load = verify, seed: int = 0) -> list[str]:
    """Flip one bit in one byte at a time, over all files.

    Args:
        folder: A bundle of the caller's own; it is as before afterwards.
        n_positions: How many bytes, at least one of each file.
        load: Has to raise `BundleError` with the file's name.
        seed: Of the positions.

    Returns:
        A line for each damage that was not refused, or refused without the file's name.
    """
    survivors, rng = [], random.Random(seed)
    for path, position in _positions(folder, n_positions, rng):
        with path.open("r+b") as file:
            file.seek(position)
            (byte,) = file.read(1)
            file.seek(position)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
        survivors += _refused(folder, path, load, f"byte {position} flipped")
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([byte]))
    return survivors


def truncate(folder: Path, n_points: int, *, load: Load = verify, seed: int = 0) -> list[str]:
    """Cut one file at a time off at some point; otherwise as `flip`."""
    survivors, rng = [], random.Random(seed)
    for path, position in _positions(folder, n_points, rng):
        data = path.read_bytes()
        os.truncate(path, position)
        survivors += _refused(folder, path, load, f"cut at {position}")
        path.write_bytes(data)
    return survivors


def _positions(folder: Path, n: int, rng: random.Random) -> Iterator[tuple[Path, int]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    for i in range(max(n, len(paths))):
        path = paths[i % len(paths)]
        yield path, rng.randrange(path.stat().st_size)


def _refused(folder: Path, path: Path, load: Load, damage: str) -> list[str]:
    name = path.relative_to(folder).as_posix()
    try:
        load(folder)
    except BundleError as error:
        return [] if name in str(error) else [f"{name}, {damage}: the message does not name it: {error}"]
    return [f"{name}, {damage}: not refused"]
