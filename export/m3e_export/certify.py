"""A bundle against its reference."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from m3e.encoder import TruncationWarning
from m3e.errors import CertificateError
from m3e.manifest import Certificate
from m3e.progress import progress_bar
from m3e.tokenizer import Tokenizer
from m3e_export.checkpoint import Checkpoint
from m3e_export.reference import reference_embeddings, reference_name
from m3e_export.texts import certificate_texts

# The largest difference between unit vectors that rounding explains: float32 keeps 24 bits, and two correct
# implementations of 4 to 24 layers were 6e-8 to 3e-7 apart on every shape measured.
# For int8 and fp16, how far the worst text may turn: 1 - cosine.
TOLERANCE = {"fp32": 5e-6, "int8": 0.03, "fp16": 1e-4}


def certify(
    encode: Callable[[Sequence[str]], npt.NDArray[np.float32]],
    precision: str,
    checkpoint: Checkpoint,
    *,
    accept_accuracy: bool = False,
) -> Certificate:
    """Embed the certificate's texts with the runtime and with the reference, and compare.

    Args:
        encode: The graph as a user runs it: texts to float32 (n, dim), without the model's default prompt.
        precision: The graph's.
        checkpoint: What the bundle was made from.
        accept_accuracy: Take an int8 graph that is beyond its tolerance, and record that.

    Returns:
        The figures.

    Raises:
        CertificateError: A figure is beyond the tolerance.
    """
    texts = certificate_texts()
    tokens = Tokenizer(checkpoint.tokenizer_json, checkpoint.max_seq_length)(texts)
    rows = []
    with progress_bar(int(tokens.n_tokens.sum()), "token") as progress:
        for row, vector in enumerate(reference_embeddings(checkpoint, tokens.input_ids)):
            rows.append(vector)
            progress.update(int(tokens.n_tokens[row]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # the longest texts are meant to be cut
        embeddings = encode(texts)
    certificate = compare(embeddings, np.stack(rows), tokens.n_tokens, reference_name(), TOLERANCE[precision])
    if precision == "fp32":
        if not max(certificate.max_abs_difference, certificate.max_norm_difference) <= certificate.tolerance:
            raise CertificateError(
                f"the fp32 graph does not agree with {certificate.reference}: unit vectors differ by up to "
                f"{certificate.max_abs_difference:.1e}, norms by {certificate.max_norm_difference:.1e}, allowed are "
                f"{certificate.tolerance:.0e}. Nothing was published. The checkpoint does something that the exporter "
                "does not know; please report it with the checkpoint's config.json"
            )
    elif not 1 - certificate.min_cosine <= certificate.tolerance:
        if not accept_accuracy:
            raise CertificateError(
                f"the {precision} graph turns a text to a cosine of {certificate.min_cosine:.5f} (mean "
                f"{certificate.mean_cosine:.5f}), allowed are {1 - certificate.tolerance:.4g}. Nothing was published. "
                "Convert with --precision fp32, calibrate on texts of your own with --calibration FILE, or take it "
                "with --accept-accuracy"
            )
        certificate = dataclasses.replace(certificate, accepted=True)
    return certificate


def compare(
    embeddings: npt.NDArray[np.float32],
    expected: npt.NDArray[np.float64],
    n_tokens: npt.NDArray[np.int64],
    reference: str,
    tolerance: float,
) -> Certificate:
    """Measure embeddings (n, dim) against the reference's (n, dim), in float64."""
    actual = embeddings.astype(np.float64)
    norms, expected_norms = np.linalg.norm(actual, axis=1), np.linalg.norm(expected, axis=1)
    unit, expected_unit = actual / norms[:, None], expected / expected_norms[:, None]
    cosines = (unit * expected_unit).sum(axis=1)
    return Certificate(
        reference=reference,
        n_texts=len(embeddings),
        min_tokens=int(n_tokens.min()),
        max_tokens=int(n_tokens.max()),
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        max_abs_difference=float(np.abs(unit - expected_unit).max()),
        max_norm_difference=float(np.abs(norms / expected_norms - 1).max()),
        tolerance=tolerance,
        accepted=False,
    )
