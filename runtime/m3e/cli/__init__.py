"""The command ``m3e``: each command in a file of its own, errors and exit codes here.

Exit codes: 0 done; 1 the bundle, the model or the machine failed; 2 the command line or the input is wrong;
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata

from m3e import __version__
from m3e.cli import encode, info, verify
from m3e.errors import InputError, M3EError

_BUILT_IN = {"encode": encode, "info": info, "verify": verify}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``m3e``; the exit code is returned."""
    parser = argparse.ArgumentParser(
        prog="m3e",
        description="Sentence embeddings from a bundle of ONNX graphs.",
        epilog="m3e COMMAND --help shows examples of each command.",
    )
    parser.add_argument("--version", action="version", version=f"m3e-runtime {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in _BUILT_IN.items():
        module.add_arguments(add_command(commands, name, module.__doc__ or ""))
    # Commands of other packages: this one knows their names and nothing more.
    plugins = {entry.name: entry for entry in metadata.entry_points(group="m3e.commands")}
    for name in sorted(plugins):
        commands.add_parser(name, help=f"see m3e {name} --help", add_help=False)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in plugins:
        plugin: int = plugins[given[0]].load()(given[1:], prog=f"m3e {given[0]}")
        return plugin
    parsed = parser.parse_args(given)
    return run_guarded(parsed)


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, doc: str
) -> argparse.ArgumentParser:
    """Make a command's parser from its module's docstring: the first line, then the examples."""
    summary, _, examples = doc.partition("\n\n")
    return commands.add_parser(
        name, help=summary, description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_guarded(parsed: argparse.Namespace) -> int:
    """Run a command; known errors become one line on standard error and an exit code, never a traceback."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        parsed.run(parsed)
    except M3EError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:
        # The reader has gone (`| head`); keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
