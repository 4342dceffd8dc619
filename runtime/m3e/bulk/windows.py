"""Records -> windows: as many as are embedded together, and never more memory than that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from m3e.bulk.records import Record
from m3e.errors import InputError

WINDOW_RECORDS = 8192
# Texts of 512 tokens have some 2,000 characters, so only outliers close a window early.
_MAX_WINDOW_CHARACTERS = 32 << 20


@dataclass(slots=True)
class Window:
    """Records that are embedded together.

    Attributes:
        rows: Number of each usable record, counted over all records of the job from 0.
        texts: Their texts.
        kept: Their kept values.
        rejected: The records that cannot be used.
        position: Where the next window starts: index of the file, records of it that were read.
        n_records: Records read, usable or not.
    """

    rows: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    kept: list[tuple[Any, ...]] = field(default_factory=list)
    rejected: list[Record] = field(default_factory=list)
    position: tuple[int, int] = (0, 0)
    n_records: int = 0

    def check_usable(self) -> None:
        """Tell a job's first window that holds nothing to embed from one with some bad records.

        Raises:
            InputError: All of its records were rejected.
        """
        if self.rejected and not self.rows:
            record = self.rejected[0]
            raise InputError(
                f"none of the first {len(self.rejected)} records can be used; line {record.line}: {record.problem}. "
                "Name the text's field with --text-field, or the format with --input-format"
            )


def windows(records: Iterable[Record], first_row: int, max_records: int = WINDOW_RECORDS) -> Iterator[Window]:
    """Cut a stream of records into windows. Where they are cut depends on the records alone, so a job can go on."""
    window, characters = Window(), 0
    for row, record in enumerate(records, start=first_row):
        window.n_records += 1
        window.position = (record.file, record.number)
        if record.text is None:
            window.rejected.append(record)
        else:
            window.rows.append(row)
            window.texts.append(record.text)
            window.kept.append(record.kept)
            characters += len(record.text)
        if window.n_records == max_records or characters > _MAX_WINDOW_CHARACTERS:
            yield window
            window, characters = Window(), 0
    if window.n_records:
        yield window
