"""Hub id -> bundle in the cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from m3e.cache import bundle_folder, reference_file, repository_folder
from m3e.errors import ExportError
from m3e.manifest import MANIFEST_NAME
from m3e_export.pipeline import convert
from m3e_export.sources import fetch_checkpoint

try:
    import fcntl
except ImportError:  # Windows: two first uses at once convert twice, and the first to finish wins
    fcntl = None  # type: ignore[assignment]


def pull(
    hub_id: str,
    *,
    revision: str | None = None,
    precisions: Sequence[str] = ("fp32",),
    report: Callable[[str], None] = lambda step: None,
) -> Path:
    """Convert a model of a hub into the cache, unless this commit is there with these graphs.

    Processes that pull the same model at once wait for one another; the bundle appears whole or not at all.

    Args:
        hub_id: ``ORGANISATION/MODEL``, or ``modelscope:ORGANISATION/MODEL``.
        revision: Branch, tag or commit; None for the hub's default.
        precisions: Graphs that the bundle must have.
        report: Called with a line of text at each step.

    Returns:
        The bundle's folder.

    Raises:
        CheckpointError: The hub cannot be reached, or the model cannot be converted.
        ExportError: The cache cannot be written.
        DependencyError: A package is missing.
    """
    report(f"asking for {hub_id}")
    source = fetch_checkpoint(hub_id, revision)
    if source.revision is None:
        raise ExportError(f"{hub_id!r} is a folder here; convert it with 'm3e convert {hub_id} -o DIR'")
    target = bundle_folder(hub_id, source.revision, precisions)
    try:
        with _locked(repository_folder(hub_id)):
            if not (target / MANIFEST_NAME).is_file():
                convert(source, target, precisions=precisions, report=report)
            _write_whole(reference_file(hub_id, revision), source.revision)
    except OSError as error:
        raise ExportError(f"the cache cannot be written: {error}; set XDG_CACHE_HOME to a folder that can") from error
    report(f"{hub_id} at {source.revision} is {target}")
    return target


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system gives it back when a process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)
