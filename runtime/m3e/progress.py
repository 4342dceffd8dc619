"""A progress bar on standard error, for people at a terminal."""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any


def progress_bar(total: int, unit: str, show: bool | None = None) -> Any:
    """Open a tqdm bar; use it with ``with`` and call ``update(n)``.

    Args:
        total: How many units there are.
        unit: What is counted, in the singular.
        show: True or False; None shows it on a terminal, and only when the work takes longer than a second.
    """
    if not (sys.stderr.isatty() if show is None else show):
        return _Silent()  # making a disabled bar of tqdm's would be noticed beside a single text
    return _bar()(total=total, unit=unit, delay=0 if show else 1, leave=show is True)


class _Silent:
    """Of a bar, what its users call; it shows nothing."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int) -> None:
        """Do nothing."""


@functools.cache
def _bar() -> Any:
    """A tqdm that threads share. Its own lock is one between processes too, for which it writes a semaphore file."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        pass

    Bar.set_lock(threading.RLock())
    return Bar
