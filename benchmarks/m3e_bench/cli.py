"""``python -m benchmarks`` and ``m3e bench``: measure, report, compare.

Exit codes: 0 done; 1 a run, a record or a ``--fail-if`` failed; 2 the command line is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from m3e.cli.guard import run_guarded
from m3e.cpu import available_threads
from m3e_bench import commands

_EXAMPLES = """\
examples:
  {prog} --quick                                     a first look: record, tables and page under .bench/report
  {prog} --models small base --data DATA             every peer; goes on where it was interrupted
  {prog} --engines m3e-int8 --endpoint tei=http://localhost:8080/v1
  {prog} engines                                     what is compared, and what installs here
  {prog} report RECORD.json --price-per-hour 0.10    the page and the Markdown again
  {prog} compare OLD.json NEW.json --fail-if "p95>+5%" --fail-if "sentences_per_s<-5%"
  {prog} readme --check                              whether pages quote their records
  {prog} quality --tasks local --models minilm       MTEB: PyTorch and every precision side by side
"""
_COMMANDS = ("run", "report", "compare", "readme", "engines", "quality")


def main(arguments: Sequence[str] | None = None, prog: str = "m3e bench") -> int:
    """Run a command, ``run`` if none is named; the exit code is returned."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0] not in _COMMANDS and given[0] not in ("-h", "--help")):
        given.insert(0, "run")
    parser = argparse.ArgumentParser(
        prog=prog, description="Measure m3e against its peers.", epilog=_EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands_ = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, add in (
        ("run", _add_run),
        ("report", _add_report),
        ("compare", _add_compare),
        ("readme", _add_readme),
        ("engines", _add_engines),
        ("quality", _add_quality),
    ):
        function = getattr(commands, name)
        summary = (function.__doc__ or "").partition("\n")[0]
        command = commands_.add_parser(name, help=summary, description=summary)
        add(command)
        command.set_defaults(run=function)
    return run_guarded(parser.parse_args(given))


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="few rounds (meant to take about two minutes), only what is installed"
    )
    parser.add_argument(
        "--models", nargs="+", metavar="MODEL",
        help="shapes with random weights (tiny small base large), minilm, or checkpoint folders (default: small)",
    )  # fmt: skip
    parser.add_argument("--accuracy-models", nargs="+", default=[], metavar="MODEL", help="trained; for accuracy alone")
    parser.add_argument("--engines", nargs="+", metavar="NAME", help="default: all; the command engines lists them")
    parser.add_argument(
        "--endpoint", action="append", default=[], metavar="NAME=URL", help="a server of OpenAI's /v1/embeddings"
    )
    _add_data(parser)
    parser.add_argument(
        "--threads", type=int, default=available_threads(), help="of each engine (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, help="turns of each engine for each figure")
    parser.add_argument(
        "--questions", nargs="+", choices=commands.QUESTIONS, help="default: all; a quick run leaves scaling out"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="STEM", help="writes STEM.json, .html and .md (default: .bench/report)"
    )
    parser.add_argument("--price-per-hour", type=float, default=0.10, help="of this machine (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="begin anew where an interrupted run could go on")
    _add_work(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("record", type=Path)
    parser.add_argument("-o", "--output", type=Path, metavar="STEM", help="default: beside the record")
    parser.add_argument("--price-per-hour", type=float, default=0.10)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--fail-if", action="append", default=[], metavar="CONDITION",
        help='such as "p95>+5%%", "sentences_per_s<-5%%", "cosine_min<-0.001"; several are allowed',
    )  # fmt: skip
    parser.add_argument("--engines", default="m3e-*", metavar="PATTERN", help="which engines (default: %(default)s)")
    parser.add_argument(
        "--relative-to", metavar="ENGINE",
        help="compare ratios to this engine of the same run, so that a faster or busier machine does not count",
    )  # fmt: skip


def _add_readme(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a page is stale")


def _add_engines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--install", action="store_true", help="make the environments now")
    _add_work(parser)


def _add_quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["small"], metavar="MODEL")
    parser.add_argument(
        "--tasks", nargs="+", default=["m3e"], metavar="TASK",
        help="m3e (the tasks of M3E's own table), cmteb, local (from --data), or names of MTEB tasks",
    )  # fmt: skip
    parser.add_argument("--engines", nargs="+", default=["st-torch-fp32", "m3e-fp32", "m3e-int8"], metavar="NAME")
    parser.add_argument("-o", "--output", type=Path, metavar="STEM", help="default: .bench/quality")
    parser.add_argument("--limit", type=int, help="texts or pairs of a local task (default: all)")
    _add_data(parser)
    parser.add_argument("--threads", type=int, default=available_threads())
    _add_work(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("M3E_DATA_DIR"), metavar="DIR",
        help="folder of public sets (default: M3E_DATA_DIR, else the corpus of the exporter)",
    )  # fmt: skip


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="environments, models, journals")


if __name__ == "__main__":
    sys.exit(main())
