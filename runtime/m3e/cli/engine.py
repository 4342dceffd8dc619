"""Build a bundle's TensorRT engines ahead of time, for this card.

Examples:
  m3e engine build bundles/m3e-base
  m3e engine build bundles/m3e-base --precision int8 --cache /srv/m3e/engines

It takes minutes. Engines hold for one card and one set of versions; they are kept in a private folder, where
Encoder(bundle, device="tensorrt", engine_cache=...) finds them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from m3e.backends import Engines, choose_graph
from m3e.bundle import Bundle
from m3e.canary import check_canary
from m3e.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=["build"], help="build: make what is missing")
    parser.add_argument("bundle", help="folder written by convert.py --target tensorrt")
    parser.add_argument("--precision", choices=["auto", "fp16", "int8"], default="auto", help="default: fp16, if there")
    parser.add_argument("--device-id", type=int, default=0, metavar="N", help="which card (default: 0)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="default: the user's own, of m3e's cache")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    bundle = Bundle(parsed.bundle)
    graph = choose_graph(bundle, parsed.precision, "tensorrt")
    engines = Engines(bundle, graph, device_id=parsed.device_id, cache=parsed.cache)
    session = engines.find()
    if session is None:
        session = engines.build(progress=lambda line: print(line, file=sys.stderr, flush=True))
    tokenizer = Tokenizer(bundle.read_tokenizer(), bundle.manifest.model.max_seq_length)
    difference = check_canary(bundle.manifest, graph, tokenizer, session)
    sys.stdout.write(
        f"{graph.file} on {engines.key.card}: golden texts differ by {difference:.1e} "
        f"(allowed {graph.canary_tolerance:.0e}); engines {engines.key.digest()}\n"
    )
