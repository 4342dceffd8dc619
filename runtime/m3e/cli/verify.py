"""Check every byte of a bundle and run its golden texts on this machine.

Examples:
  m3e verify bundles/m3e-base && echo safe to serve
"""

from __future__ import annotations

import argparse
import sys

from m3e.backends import sums_whole_numbers
from m3e.bundle import Bundle
from m3e.cache import locate
from m3e.canary import check_canary
from m3e.cpu import available_threads
from m3e.session import Session
from m3e.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", help="folder written by convert.py, or hub id that was pulled")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    bundle = Bundle(locate(parsed.bundle))
    bundle.verify()
    sys.stdout.write(f"{len(bundle.manifest.files)} files match the manifest\n")
    tokenizer = Tokenizer(bundle.read_tokenizer(), bundle.manifest.model.max_seq_length)
    for graph in bundle.manifest.graphs:
        if graph.target != "cpu":
            sys.stdout.write(f"{graph.file}: for {graph.target}, checked when it is opened there\n")
            continue
        session = Session(bundle.read_graph(graph), num_threads=available_threads(), mixed=sums_whole_numbers(graph))
        difference = check_canary(bundle.manifest, graph, tokenizer, session)
        sys.stdout.write(
            f"{graph.file}: golden texts differ by {difference:.1e} here (allowed {graph.canary_tolerance:.0e})\n"
        )
