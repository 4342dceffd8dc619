"""Errors and exit codes of every command.

0 done; 1 the bundle, the model or the machine failed; 2 the command line or the input is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings

from m3e.errors import InputError, M3EError


def run_guarded(parsed: argparse.Namespace) -> int:
    """Run a command; known errors become one line on standard error and an exit code, never a traceback."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as the input, and as JSON must be; a locale may not know a character
    try:
        parsed.run(parsed)
        print(end="", flush=True)  # a full disk or a reader that has gone shows here, not when Python exits
    except M3EError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader has gone (`| head`): nobody to tell
            print(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        _flush_or_drop()
        return 2 if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _flush_or_drop() -> None:
    """Write what is left of the output, or drop it: Python would complain when it tries again at exit."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
