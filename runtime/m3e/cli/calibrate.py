"""Learn from labelled pairs what a bundle's similarities mean.

The file has two texts and 1 (same meaning) or 0 in each line, with tabs between them; a graded score counts as the
same from --positive-from on. The result lies in the bundle as similarity.json, for similarity(..., calibrated=True).

Examples:
  m3e calibrate bundles/m3e-base pairs.tsv --precision 0.95
  m3e calibrate bundles/m3e-base stsb.tsv --precision 0.9 --positive-from 4
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from m3e.bundle import SIDE_NAME
from m3e.calibration import fit
from m3e.encoder import Encoder
from m3e.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", help="folder written by convert.py")
    parser.add_argument("pairs", help="UTF-8 file: text, text, label, with tabs between them")
    parser.add_argument("--precision", type=float, default=0.95, metavar="P", help="share of the pairs above the "
                        "threshold that shall mean the same (default: 0.95)")  # fmt: skip
    parser.add_argument("--positive-from", type=float, default=1.0, metavar="X", help="least label of a pair that "
                        "means the same (default: 1)")  # fmt: skip
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    left, right, labels = _read(Path(parsed.pairs), parsed.positive_from)
    encoder = Encoder(parsed.bundle)
    vectors = encoder.encode(left + right)
    scores = [encoder.similarity(a, b)[0, 0] for a, b in zip(vectors[: len(left)], vectors[len(left) :], strict=True)]
    manifest = encoder.manifest
    calibration = fit(
        np.array(scores), labels, precision=parsed.precision, space_id=manifest.space_id,
        similarity_fn_name=manifest.model.similarity_fn_name,
    )  # fmt: skip
    folder = Path(parsed.bundle).resolve()
    temporary = folder.with_name(f".{folder.name}.{SIDE_NAME}.tmp")
    temporary.write_bytes(calibration.to_bytes())
    temporary.replace(Path(parsed.bundle) / SIDE_NAME)
    sys.stdout.write(
        f"{calibration.n_pairs} pairs, {calibration.n_positive} of the same meaning\n"
        f"at and above {calibration.threshold:.4f}: precision {calibration.precision:.3g}, "
        f"recall {calibration.recall:.3f}\nwritten to {Path(parsed.bundle) / SIDE_NAME}\n"
    )


def _read(path: Path, positive_from: float) -> tuple[list[str], list[str], list[bool]]:
    left, right, labels = [], [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            a, b, label = line.decode("utf-8").split("\t")
            labels.append(float(label) >= positive_from)
        except ValueError as error:  # also what is not UTF-8
            raise InputError(f"line {number} of {str(path)!r} is not text, text, number with tabs between them: {error}"
                             ) from error  # fmt: skip
        left.append(a)
        right.append(b)
    return left, right, labels
