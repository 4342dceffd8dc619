"""Tell whether the vectors of two bundles may be mixed, and measure it.

Exit code 0: they may, their space_id is equal. 1: they may not, whatever the figures say.

Examples:
  m3e compare bundles/old bundles/new && echo no need to embed again
  m3e compare bundles/fp32 bundles/int8 --texts corpus.txt
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from m3e.comparison import N_NEIGHBOURS, compare
from m3e.encoder import Encoder, TruncationWarning
from m3e.errors import BundleError, InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("first", help="folder written by convert.py, or hub id: what your vectors were made with")
    parser.add_argument("second", help="the other one")
    parser.add_argument(
        "--texts", metavar="FILE", help="UTF-8 file with a text a line (default: the bundles' golden texts)"
    )
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    first, second = Encoder(parsed.first), Encoder(parsed.second)
    if parsed.texts is None:
        texts = [golden.text for encoder in (first, second) for golden in encoder.manifest.golden]
    else:
        texts = _read(parsed.texts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # both cut, or the cosine shows it
        found = compare(first, second, texts)
    facts = {
        "space": f"{first.space_id} and {second.space_id}: {'equal' if found.same_space else 'different'}",
        "graphs": f"{first.precision} and {second.precision}",
        "texts": str(found.n_texts),
    }
    if found.min_cosine is None or found.mean_cosine is None or found.worst_text is None:
        facts["cosine"] = "none, the vectors have " + " and ".join(
            str(encoder.get_sentence_embedding_dimension()) for encoder in (first, second)
        ) + " dimensions"  # fmt: skip
    else:
        facts["cosine"] = f"mean {found.mean_cosine:.6f}, worst {found.min_cosine:.6f} ({found.worst_text[:40]!r})"
    if found.neighbour_overlap is not None:
        facts[f"nearest {N_NEIGHBOURS}"] = f"{found.neighbour_overlap:.1%} stay when the two are mixed"
    sys.stdout.write("".join(f"{name:<14}{value}\n" for name, value in facts.items()))
    if not found.same_space:
        raise BundleError(
            "the vectors of these two may not be mixed: weights, tokenizer, pooling or normalisation differ. "
            "Embed everything with one of them"
        )


def _read(path: str) -> list[str]:
    try:
        texts = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path!r} is not UTF-8 at byte {error.start}") from error
    if not texts:
        raise InputError(f"{path!r} holds no texts, expected one a line")
    return texts
