"""The whole job, told in order: read a window, embed it, write it, commit; and where it goes on after a kill."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m3e.bulk.durable import AppendedFile
from m3e.bulk.inputs import Input
from m3e.bulk.job import STATE_NAME, State, load_state, locked, resume_or_start
from m3e.bulk.records import Fields
from m3e.bulk.sinks import (
    JOINED_NAME,
    JSONL_NAME,
    NPY_NAME,
    ROWS_NAME,
    JsonlFile,
    NpyFile,
    ParquetParts,
    Rows,
    Sink,
    arrow_schema,
)
from m3e.bulk.vectors import VectorSource
from m3e.bulk.windows import WINDOW_RECORDS, Window, windows
from m3e.checks import check_integer
from m3e.errors import InputError
from m3e.progress import progress_bar

# At 2,000 rows a second a kill costs half a minute, and a billion rows are 15,000 files.
ROWS_PER_PART = 65536
_REJECTED_NAME = "_rejected.jsonl"
# Endings of files that are not written here; a folder of Parquet parts would be no help to who asks for one.
_NOT_WRITTEN = frozenset({".csv", ".tsv", ".txt", ".json", ".gz", ".zst", ".arrow", ".feather", ".h5", ".xlsx"})
# The files of a complete folder, and what follows the output's name when a single file was asked for. The vectors
# come last: when they are there, everything is.
_SINGLE = {_REJECTED_NAME: ".rejected.jsonl", ROWS_NAME: ".rows.npy", STATE_NAME: ".m3e.json"} | dict.fromkeys(
    (JOINED_NAME, NPY_NAME, JSONL_NAME), ""
)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a job did: vectors in the output, and those of this run; records rejected, texts cut, seconds.

    Attributes:
        absent: Fields to keep that no record of this run had, on Ray also those that were null in all.
    """

    rows: int
    new_rows: int
    rejected: int
    truncated: int
    seconds: float
    absent: tuple[str, ...] = ()


def embed(
    source: Input,
    output: Path,
    vectors: VectorSource,
    fields: Fields,
    *,
    rows_per_part: int = ROWS_PER_PART,
    append: bool = False,
    show_progress: bool | None = None,
) -> Summary:
    """Embed an input of any length into files; called again after a kill, it goes on.

    Args:
        source: What to read.
        output: ``NAME.parquet``, ``NAME.npy``, ``NAME.jsonl``, or a folder for Parquet parts. A single file is made in
            the folder ``NAME.ENDING.partial`` and appears when it is complete.
        vectors: What embeds.
        fields: Which field is the text, and which are copied.
        rows_per_part: At least this many rows between two commits, and in each Parquet part.
        append: Put the rows behind those of a complete job in the folder.
        show_progress: True or False; None for a bar on a terminal.

    Returns:
        What was done.

    Raises:
        InputError: The input cannot be read, or the output holds something else.
    """
    rows_per_part = check_integer("rows_per_part", rows_per_part)
    if output.suffix == ".npy" and fields.kept:
        raise InputError("an .npy file holds vectors alone; keep no fields, or write Parquet or JSON lines")
    if output.suffix in _NOT_WRITTEN and not output.is_dir():
        raise InputError(f"{output.name!r} would be a folder; files end in .parquet, .npy or .jsonl")
    job = {"input": source.identity, "text_field": fields.text, "columns": fields.kept, "rows_per_part": rows_per_part,
           "vectors": vectors.describe(), "engine": "local"}  # fmt: skip
    wanted = State(space=vectors.space, job=json.loads(json.dumps(job)))
    single = output.suffix in (".parquet", ".npy", ".jsonl")
    folder = output.with_name(output.name + ".partial") if single else output
    started = time.monotonic()
    if single:
        _publish(output)  # a kill may have left the last step undone
        if not folder.exists() and (output.exists() or output.is_symlink()):
            return _summary_of_complete(output, wanted, append)
    _make(folder)
    with locked(folder):
        state = resume_or_start(load_state(folder / STATE_NAME), wanted, folder, append=append)
        before = state.rows
        state.save(folder)  # before any other file: a folder with files and no state is not ours
        sink = _open_sink(output, folder, vectors, fields, state)
        try:
            if not state.complete:
                _run(source, folder, vectors, fields, sink, state, rows_per_part, show_progress)
            sink.finish()
        finally:
            sink.close()
        if (folder / _REJECTED_NAME).exists() and not state.rejected:
            (folder / _REJECTED_NAME).unlink()
        if single:
            folder.rename(_complete(output))
            _publish(output)
    new_rows = state.rows - before
    absent = tuple(sorted(fields.absent)) if new_rows else ()
    return Summary(state.rows, new_rows, state.rejected, state.truncated, time.monotonic() - started, absent)


def _run(
    source: Input, folder: Path, vectors: VectorSource, fields: Fields, sink: Sink, state: State, rows_per_part: int,
    show_progress: bool | None,
) -> None:  # fmt: skip
    rejected = AppendedFile(folder / _REJECTED_NAME, state.rejected_bytes)
    records = source.records(fields, (state.position[0], state.position[1]))
    stream = windows(records, state.records, min(WINDOW_RECORDS, rows_per_part))
    uncommitted, total = 0, source.total_rows()
    try:
        with progress_bar(total or 0, "row", show_progress) as progress:
            progress.initial = progress.n = state.rows
            for window in _ahead(stream):
                if window.rows:
                    sink.write(_embedded(window, vectors, fields, state))
                for record in window.rejected:
                    rejected.write(record.rejection(source.files[record.file].name))
                _advance(state, window)
                uncommitted += len(window.rows)
                if uncommitted >= rows_per_part:
                    _commit(folder, sink, rejected, state)
                    uncommitted = 0
                fraction = source.fraction_read()
                if total is None and fraction:
                    progress.total = round(state.records / fraction)
                progress.update(len(window.rows))
        state.complete = True
        _commit(folder, sink, rejected, state)
    finally:
        rejected.close()


def _ahead(stream: Iterator[Window]) -> Iterator[Window]:
    """Read the next window while the last one is embedded."""
    with ThreadPoolExecutor(1, thread_name_prefix="m3e-read") as pool:
        coming = pool.submit(next, stream, None)
        while (window := coming.result()) is not None:
            coming = pool.submit(next, stream, None)
            yield window


def _embedded(window: Window, vectors: VectorSource, fields: Fields, state: State) -> Rows:
    embeddings, truncated = vectors.embed(window.texts)
    state.truncated += int(truncated.sum())
    columns = {name: [values[i] for values in window.kept] for i, name in enumerate(fields.kept)}
    return Rows(np.array(window.rows, dtype=np.int64), columns, truncated, embeddings)


def _advance(state: State, window: Window) -> None:
    state.position = list(window.position)
    state.records += window.n_records
    state.rows += len(window.rows)
    state.rejected += len(window.rejected)
    if not state.rows:
        window.check_usable()


def _commit(folder: Path, sink: Sink, rejected: AppendedFile, state: State) -> None:
    """The state last: what it speaks of is on the disk by then, and what lies behind that is written again."""
    state.sink = sink.commit()
    state.rejected_bytes = rejected.commit()
    state.save(folder)


def _open_sink(output: Path, folder: Path, vectors: VectorSource, fields: Fields, state: State) -> Sink:
    if output.suffix == ".npy":
        return NpyFile(folder, vectors.options.precision, vectors.dim, state.sink)
    if output.suffix == ".jsonl":
        return JsonlFile(folder, state.sink)
    return ParquetParts(folder, arrow_schema(fields, vectors.space), state.sink, joined=output.suffix == ".parquet")


def _make(folder: Path) -> None:
    """Make the folder, or find it empty, or a job's. A kill before the first state leaves that one's temporary file."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / STATE_NAME).exists() and any(path.name != f"{STATE_NAME}.tmp" for path in folder.iterdir()):
        raise InputError(f"{str(folder)!r} holds files of something else; choose another -o")


def _complete(output: Path) -> Path:
    return output.with_name(output.name + ".complete")


def _publish(output: Path) -> None:
    """Give the files of a complete folder their names beside each other. Every step may be the last of a process."""
    folder = _complete(output)
    if not folder.is_dir():
        return
    for name, ending in _SINGLE.items():
        if (folder / name).exists():
            os.replace(folder / name, output.with_name(output.name + ending))  # noqa: PTH105 (the tests make it fail)
    shutil.rmtree(folder)


def _summary_of_complete(output: Path, wanted: State, append: bool) -> Summary:
    state = load_state(output.with_name(output.name + _SINGLE[STATE_NAME]))
    if append or state is None or (state.space, state.job) != (wanted.space, wanted.job):
        raise InputError(
            f"{str(output)!r} exists and is not this job's output; choose another -o"
            + (" (--append needs a folder)" if append else "")
        )
    return Summary(state.rows, 0, state.rejected, state.truncated, 0.0)
