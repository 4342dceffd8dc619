"""One reader for each format: a file -> its records, from any record on.

A record that cannot be read is a record with a problem; only what makes the whole file useless is an error.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from m3e.bulk.records import Fields, Record
from m3e.errors import DependencyError, InputError

# A longer line is a file that is not what its name says; a text of 512 tokens has some kilobytes.
_MAX_LINE_BYTES = 64 << 20
_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 1024


def read_text(stream: BinaryIO, fields: Fields, file: int, skip: int) -> Iterator[Record]:
    """Read a text a line."""
    for number, line in _numbered(stream, skip):
        if isinstance(line, str):
            yield Record(file, number, number, None, problem=line)
            continue
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield Record(file, number, number, None, problem=f"not UTF-8 at byte {error.start}")
            continue
        yield fields.record(file, number, number, {fields.text: text})


def read_jsonl(stream: BinaryIO, fields: Fields, file: int, skip: int) -> Iterator[Record]:
    """Read a JSON object a line."""
    for number, line in _numbered(stream, skip):
        if isinstance(line, str):
            yield Record(file, number, number, None, problem=line)
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Record(file, number, number, None, problem=f"not JSON: {error}")
            continue
        if isinstance(values, dict):
            yield fields.record(file, number, number, values)
        else:
            yield Record(file, number, number, None, problem=f"a JSON {type(values).__name__}, expected an object")


def read_csv(stream: BinaryIO, fields: Fields, file: int, skip: int) -> Iterator[Record]:
    """Read comma separated values under a header, quoted as RFC 4180 says."""
    return _read_delimited(stream, fields, file, skip, delimiter=",")


def read_tsv(stream: BinaryIO, fields: Fields, file: int, skip: int) -> Iterator[Record]:
    """Read tab separated values under a header; the format has no quotes."""
    return _read_delimited(stream, fields, file, skip, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_parquet(stream: BinaryIO, fields: Fields, file: int, skip: int) -> Iterator[Record]:
    """Read Parquet a batch at a time; row groups that are skipped whole are not decoded."""
    parquet = import_parquet()
    opened = parquet.ParquetFile(stream)
    _check_columns(fields, opened.schema_arrow.names)
    first, number = 0, 0
    while first < opened.num_row_groups and number + opened.metadata.row_group(first).num_rows <= skip:
        number += opened.metadata.row_group(first).num_rows
        first += 1
    groups = list(range(first, opened.num_row_groups))
    for batch in opened.iter_batches(_BATCH_ROWS, columns=fields.names, row_groups=groups):
        for values in batch.to_pylist():
            number += 1
            if number > skip:
                yield fields.record(file, number, number, values)


def read_dataset(name: str, fields: Fields, file: int, skip: int) -> Iterator[Record]:
    """Read a Hugging Face data set: a folder written by ``save_to_disk``, or ``hf:NAME[@SPLIT]`` as a stream."""
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(f"{name} is a Hugging Face data set: pip install datasets") from error
    rows: Any
    if name.startswith("hf:"):
        path, _, split = name.removeprefix("hf:").partition("@")
        rows = datasets.load_dataset(path, split=split or "train", streaming=True)
    else:
        rows = datasets.load_from_disk(name)
        if not isinstance(rows, datasets.Dataset):
            raise InputError(f"{name} has the splits {', '.join(rows)}; give the folder of one of them")
    if rows.column_names is not None:
        _check_columns(fields, rows.column_names)
        rows = rows.select_columns(fields.names)
    for number, values in enumerate(rows.skip(skip), start=skip + 1):
        yield fields.record(file, number, number, values)


READERS: dict[str, Callable[[BinaryIO, Fields, int, int], Iterator[Record]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
}


def _read_delimited(stream: BinaryIO, fields: Fields, file: int, skip: int, **dialect: Any) -> Iterator[Record]:
    # Bytes that are not UTF-8 become lone surrogates, and the check of the text finds those.
    lines = ("\udcff" if isinstance(line, str) else line.decode("utf-8", "surrogateescape") for line in _lines(stream))
    rows = csv.reader(lines, **dialect)
    header = next(rows, None)
    if header is None:
        return
    _check_columns(fields, header)
    for number in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(file, number, rows.line_num + 1, None, problem=f"not CSV: {error}")
            continue
        if number <= skip:
            continue
        if len(row) == len(header):
            yield fields.record(file, number, rows.line_num, dict(zip(header, row, strict=True)))
        else:
            problem = f"{len(row)} values, the header has {len(header)}"
            yield Record(file, number, rows.line_num, None, problem=problem)


def _check_columns(fields: Fields, names: list[str]) -> None:
    missing = [name for name in fields.names if name not in names]
    if missing:
        raise InputError(
            f"the input has no column {', '.join(map(repr, missing))}, only {', '.join(map(repr, names))}; "
            "name the text's with --text-field"
        )


def import_parquet() -> Any:
    """Give ``pyarrow.parquet``, or say how to get it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DependencyError('pyarrow is not installed: pip install "m3e-runtime[bulk]"') from error
    return pyarrow.parquet


def _numbered(stream: BinaryIO, skip: int) -> Iterator[tuple[int, bytes | str]]:
    return itertools.islice(enumerate(_lines(stream), start=1), skip, None)


def _lines(stream: BinaryIO) -> Iterator[bytes | str]:
    """Give lines without ever holding more than the longest line allowed; a str is what is wrong with one."""
    first = True
    while line := stream.readline(_MAX_LINE_BYTES):
        if first:
            line, first = line.removeprefix(_BOM), False
        if len(line) < _MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while (line := stream.readline(_MAX_LINE_BYTES)) and not line.endswith(b"\n"):
            pass
        yield f"longer than {_MAX_LINE_BYTES >> 20} MiB"
