"""A job's folder and its state: what was asked for, how far it is, and whether going on would mix two things."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from m3e.bulk.durable import publish
from m3e.errors import InputError

STATE_NAME = "_m3e.json"
_FORMAT_VERSION = 1


@dataclass(slots=True, kw_only=True)
class State:
    """The whole of ``_m3e.json``. It is replaced as a whole after everything that it speaks of is on the disk.

    Attributes:
        space: What decides whether two vectors may be compared; appending needs the same.
        job: The input and every option; going on needs the same.
        position: Index of the input's file, records of it that are done.
        records: Records done, those of earlier inputs included: the next one's row number.
        rows: Vectors written.
        truncated: Texts among them that were longer than the model reads.
        rejected: Records that could not be used.
        rejected_bytes: Length of the list of those.
        sink: What the sink needs to know to go on.
        complete: Whether the input was read to its end.
        format_version: Of this file.
    """

    space: dict[str, Any]
    job: dict[str, Any]
    position: list[int] = field(default_factory=lambda: [0, 0])
    records: int = 0
    rows: int = 0
    truncated: int = 0
    rejected: int = 0
    rejected_bytes: int = 0
    sink: dict[str, int] = field(default_factory=dict)
    complete: bool = False
    format_version: int = _FORMAT_VERSION

    def save(self, folder: Path) -> None:
        """Replace the file."""
        temporary = folder / "_m3e.json.tmp"
        temporary.write_bytes(self.to_bytes())
        publish(temporary, folder / STATE_NAME)

    def to_bytes(self) -> bytes:
        """The file's content."""
        return (json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n").encode()


def load_state(path: Path) -> State | None:
    """Read a state; None where there is none.

    Raises:
        InputError: The file is no state of this version.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not JSON ({error}); choose another -o") from error
    if not isinstance(content, dict) or content.get("format_version") != _FORMAT_VERSION:
        raise InputError(f"{str(path)!r} was not written by this version of m3e embed; choose another -o")
    return State(**content)


def resume_or_start(state: State | None, wanted: State, folder: Path, *, append: bool) -> State:
    """Decide what the folder's state means for this job.

    Args:
        state: What is there.
        wanted: The job from its beginning.
        folder: Where it is, for the messages.
        append: Whether a new input may be added to a complete job.

    Returns:
        The state to go on from.

    Raises:
        InputError: Going on would mix vectors of two spaces, or the rows of two jobs.
    """
    if state is None:
        return wanted
    different = [name for name in wanted.space if state.space.get(name) != wanted.space[name]]
    if different:
        there, here = ({name: space.get(name) for name in different} for space in (state.space, wanted.space))
        raise InputError(f"{str(folder)!r} holds vectors of another space: {there}, this job's are {here}; "
                         "they cannot be compared. Choose another -o")  # fmt: skip
    changed = [name for name in wanted.job if state.job.get(name) != wanted.job[name]]
    if not changed:  # also a complete one: the same command twice adds nothing twice
        return state
    if not state.complete and not state.rows:  # begun wrongly, such as with the name of a field that is not there
        return wanted
    if not state.complete:
        raise InputError(
            f"{str(folder)!r} holds an unfinished job with another {_listed(changed)}; finish it with the same "
            "command that began it, or choose another -o"
        )
    if not append:
        raise InputError(f"{str(folder)!r} holds a complete job with another {_listed(changed)}; add --append to put "
                         "these rows behind its own, or choose another -o")  # fmt: skip
    if state.job["engine"] != wanted.job["engine"]:  # there are no row numbers to go on from
        raise InputError(f"{str(folder)!r} was written by the engine {state.job['engine']}; choose another -o")
    if state.job["columns"] != wanted.job["columns"]:
        raise InputError(f"{str(folder)!r} has the columns {state.job['columns']}, these rows {wanted.job['columns']}")
    state.job, state.position, state.complete = wanted.job, [0, 0], False
    return state


def _listed(names: list[str]) -> str:
    return " and ".join(names) or "name"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process away from the folder; the system lets go when the process ends, however it ends.

    Raises:
        InputError: Another process is at work there.
    """
    try:
        import fcntl
    except ImportError:  # Windows: no such lock
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InputError(f"another process is writing to {str(folder)!r}") from error
    finally:
        os.close(descriptor)
