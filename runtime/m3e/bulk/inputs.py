"""What INPUT means: files, folders, standard input, data sets -> records in a fixed order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from m3e.bulk.readers import READERS, import_parquet, read_dataset
from m3e.bulk.records import Fields, Record
from m3e.errors import DependencyError, InputError

_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read: where, as what, and how large (None where that is not known before it was read)."""

    path: str
    name: str
    format: str
    size_bytes: int | None


class Input:
    """Everything that one INPUT stands for.

    Args:
        argument: A file, a folder (every file in it whose ending is known, by name), the URL of either for fsspec,
            ``-`` for standard input, a folder written by ``datasets.save_to_disk``, or ``hf:NAME[@SPLIT]``. Files may
            be compressed.
        format_: One of `READERS`; None to go by the ending, and lines of text on standard input.

    Raises:
        InputError: Nothing is there, or its format is not known.
    """

    def __init__(self, argument: str, format_: str | None = None) -> None:
        self.files = list(_find(argument, format_))
        self._open: BinaryIO | None = None
        self._current = 0

    @property
    def identity(self) -> list[list[Any]]:
        """Names and sizes: what must be the same when a job goes on."""
        return [[file.name, file.size_bytes] for file in self.files]

    def records(self, fields: Fields, start: tuple[int, int] = (0, 0)) -> Iterator[Record]:
        """Read from a place on: index of the file, records of it to skip."""
        skip = start[1]
        for index in range(start[0], len(self.files)):
            yield from self.records_of_file(index, fields, skip)
            skip = 0

    def records_of_file(self, index: int, fields: Fields, skip: int = 0) -> Iterator[Record]:
        """Read one of the files, without its first records."""
        file = self.files[index]
        self._current = index
        if file.format == "dataset":
            yield from read_dataset(file.path, fields, index, skip)
        elif file.path == "-":
            yield from READERS[file.format](sys.stdin.buffer, fields, index, skip)
        else:
            with _opened(file) as stream:
                self._open = stream
                try:
                    yield from READERS[file.format](stream, fields, index, skip)
                finally:
                    self._open = None

    def total_rows(self) -> int | None:
        """Count the rows where the files say how many they have."""
        if any(not file.path.endswith(".parquet") or "://" in file.path for file in self.files):
            return None
        rows: int = sum(import_parquet().read_metadata(file.path).num_rows for file in self.files)
        return rows

    def fraction_read(self) -> float | None:
        """How much of the bytes was read, 0 to 1; None where that is not known."""
        sizes = [file.size_bytes for file in self.files]
        stream = self._open
        if stream is None or None in sizes or self.files[self._current].path.endswith(_COMPRESSED):
            return None
        try:
            read = sum(size or 0 for size in sizes[: self._current]) + stream.tell()
        except ValueError:  # the reading thread has just closed it
            return None
        return min(1.0, read / max(1, sum(size or 0 for size in sizes)))


def _find(argument: str, format_: str | None) -> Iterator[InputFile]:
    if argument == "-":
        if format_ == "parquet":
            raise InputError("Parquet cannot be read from standard input; give a file")
        yield InputFile("-", "-", format_ or "text", None)
    elif argument.startswith("hf:"):
        yield InputFile(argument, argument, "dataset", None)
    elif "://" in argument:
        yield from _at_url(argument, format_)
    elif not Path(argument).exists():
        raise InputError(f"no input at {argument!r}: there is no such file or folder")
    elif not Path(argument).is_dir():
        path = Path(argument).absolute()
        yield InputFile(str(path), path.name, format_ or _format_of(path.name), path.stat().st_size)
    elif (Path(argument) / "state.json").exists() and (Path(argument) / "dataset_info.json").exists():
        yield InputFile(str(Path(argument).absolute()), Path(argument).name, "dataset", None)
    else:
        yield from _in_folder(Path(argument), format_)


def _in_folder(folder: Path, format_: str | None) -> Iterator[InputFile]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in _data_files(names, str(folder)):
        path = folder.absolute() / name
        yield InputFile(str(path), name, format_ or _format_of(name), path.stat().st_size)


def _at_url(url: str, format_: str | None) -> Iterator[InputFile]:
    filesystem, path = filesystem_of(url)
    try:
        there = filesystem.info(path)
    except FileNotFoundError as error:
        raise InputError(f"no input at {url!r}: there is no such file or folder") from error
    if there["type"] != "directory":
        yield InputFile(url, url, format_ or _format_of(path), there["size"])
        return
    entries = filesystem.find(path, detail=True)
    names = {full.removeprefix(path).lstrip("/"): full for full in entries}
    for name in _data_files(list(names), url):
        full = names[name]
        yield InputFile(filesystem.unstrip_protocol(full), name, format_ or _format_of(name), entries[full]["size"])


def _data_files(names: list[str], folder: str) -> list[str]:
    """Those with a known ending, sorted; hidden files and those that start with ``_`` are not data."""
    shown = [name for name in names if not any(part.startswith((".", "_")) for part in name.split("/"))]
    found = sorted(name for name in shown if _ending(name) in _ENDINGS)
    if not found:
        raise InputError(f"{folder!r} holds no file that ends in {', '.join(_ENDINGS)}")
    return found


def _format_of(name: str) -> str:
    ending = _ending(name)
    if ending not in _ENDINGS:
        raise InputError(
            f"the format of {name!r} is not known from its ending; name it with --input-format {' | '.join(READERS)}"
        )
    return _ENDINGS[ending]


def _ending(name: str) -> str:
    for compressed in _COMPRESSED:
        name = name.removesuffix(compressed)
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (a URL is no path)


def _opened(file: InputFile) -> Any:
    if "://" not in file.path and not file.path.endswith(_COMPRESSED):
        return Path(file.path).open("rb")
    return _fsspec(file.path).open(file.path, "rb", compression="infer")


def filesystem_of(url: str) -> tuple[Any, str]:
    """Give the fsspec file system of a path or URL, and the path in it.

    Raises:
        DependencyError: fsspec, or what it needs for this protocol, is not installed.
        InputError: The protocol is not known.
    """
    try:
        filesystem, path = _fsspec(url).url_to_fs(url)
    except ImportError as error:
        raise DependencyError(f"{url}: {error}") from error
    except ValueError as error:
        raise InputError(f"{url}: {error}") from error
    return filesystem, str(path)


def _fsspec(path: str) -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise DependencyError(f'{path} needs fsspec: pip install "m3e-runtime[bulk]"') from error
    return fsspec
