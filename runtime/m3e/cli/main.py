"""``m3e COMMAND``: finds the command and hands it the rest of the line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from m3e import __version__
from m3e.cli import calibrate, compare, embed, encode, engine, export_triton, info, serve, verify
from m3e.cli.guard import run_guarded

_BUILT_IN: dict[str, Any] = {
    "calibrate": calibrate,
    "compare": compare,
    "embed": embed,
    "encode": encode,
    "engine": engine,
    "export-triton": export_triton,
    "info": info,
    "serve": serve,
    "verify": verify,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``m3e``; the exit code is returned."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    if name in _BUILT_IN:
        return _run(name, given[1:])
    # Commands of other packages: this one knows their names and nothing more.
    plugins = {entry.name: entry for entry in metadata.entry_points(group="m3e.commands")}
    if name in plugins:
        try:
            command = plugins[name].load()
        except ImportError as error:
            print(f"error: m3e {name} needs a package that is not installed: {error}", file=sys.stderr)
            return 1
        code: int = command(given[1:], prog=f"m3e {name}")
        return code
    summaries = {known: module.__doc__.partition("\n")[0] for known, module in _BUILT_IN.items()}
    summaries |= {known: f"See m3e {known} --help." for known in sorted(plugins)}
    listing = "\n".join(f"    {known:<15}{summary}" for known, summary in summaries.items())
    parser = argparse.ArgumentParser(
        prog="m3e",
        description="Sentence embeddings from a bundle of ONNX graphs.",
        epilog=f"commands:\n{listing}\n\nm3e COMMAND --help shows examples of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"m3e-runtime {__version__}")
    parser.add_argument("command", choices=list(summaries), metavar="COMMAND", help="one of those below")
    parser.parse_args(given)
    return 2  # not reached: every command that the parser accepts was handled above


def _run(name: str, arguments: Sequence[str]) -> int:
    """Run a built-in command; its module's docstring is its help: the first line, then the examples."""
    module = _BUILT_IN[name]
    summary, _, examples = (module.__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"m3e {name}",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    # Intermixed: texts may also stand behind the options.
    return run_guarded(parser.parse_intermixed_args(arguments))
