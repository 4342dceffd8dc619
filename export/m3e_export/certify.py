"""A bundle against its reference."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from m3e.encoder import TruncationWarning
from m3e.errors import CertificateError
from m3e.manifest import Certificate, Graph
from m3e.progress import progress_bar
from m3e.tokenizer import Tokenizer
from m3e.vectors import normalize as unit_rows
from m3e_export.checkpoint import Checkpoint
from m3e_export.evaluate import Encode, Pair, distinct, evaluate
from m3e_export.reference import reference_embeddings, reference_name
from m3e_export.texts import certificate_texts

# The largest difference between unit vectors that rounding explains: float32 keeps 24 bits, and two correct
# implementations of 4 to 24 layers were 6e-8 to 3e-7 apart on every shape measured.
# For int8 and fp16, how far the worst text may turn: 1 - cosine.
TOLERANCE = {"fp32": 5e-6, "int8": 0.03, "fp16": 1e-4}
# On labelled pairs: what Spearman's correlation may lose, and the share of neighbours that must stay.
_SPEARMAN_LOSS = 0.005
_TOP10_OVERLAP = 0.9
# Texts that are embedded once more, each alone.
_ALONE = 40
_BATCH_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class References:
    """The reference's vectors, computed once for all graphs of a bundle.

    Attributes:
        texts: The certificate's texts.
        n_tokens: Their token counts, int64 (n,).
        expected: Their vectors, float64 (n, dim).
        pairs: Labelled pairs of the user's, or none.
        pair_vectors: Vectors of the pairs' distinct texts, float64 (n_texts, dim).
    """

    texts: list[str]
    n_tokens: npt.NDArray[np.int64]
    expected: npt.NDArray[np.float64]
    pairs: Sequence[Pair]
    pair_vectors: npt.NDArray[np.float64]


def references(checkpoint: Checkpoint, pairs: Sequence[Pair] = ()) -> References:
    """Embed the certificate's texts, and those of labelled pairs, with the reference."""
    texts = certificate_texts()
    n_tokens, expected = _embed(checkpoint, texts)
    pair_vectors = _embed(checkpoint, distinct(pairs))[1] if pairs else expected[:0]
    return References(texts, n_tokens, expected, pairs, pair_vectors)


def _embed(checkpoint: Checkpoint, texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Token counts (n,) and the reference's vectors (n, dim) of texts."""
    tokens = Tokenizer(checkpoint.tokenizer_json, checkpoint.max_seq_length)(texts)
    rows = []
    with progress_bar(int(tokens.n_tokens.sum()), "token") as progress:
        for n_tokens, row in zip(tokens.n_tokens, reference_embeddings(checkpoint, tokens.input_ids), strict=True):
            rows.append(row)
            progress.update(int(n_tokens))
    return tokens.n_tokens, np.stack(rows)


def certify(encode: Encode, graph: Graph, reference: References, *, accept_accuracy: bool = False) -> Certificate:
    """Embed the certificate's texts with a graph, and compare with the reference.

    Args:
        encode: Embeds texts with it: float32 (n, dim).
        graph: What the bundle says of it.
        reference: What its vectors should be.
        accept_accuracy: Take an int8 or fp16 graph that is beyond its tolerance, and record that.

    Returns:
        The figures.

    Raises:
        CertificateError: A figure is beyond the tolerance.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # the longest texts are meant to be cut
        embeddings = encode(reference.texts)
        some = np.linspace(0, len(embeddings) - 1, _ALONE).astype(int)
        alone = np.concatenate([encode([reference.texts[i]]) for i in some])
        evaluation = evaluate(encode, reference.pairs, reference.pair_vectors) if reference.pairs else None
    certificate = dataclasses.replace(
        compare(embeddings, reference.expected, reference.n_tokens, reference_name(), TOLERANCE[graph.precision]),
        max_batch_difference=float(np.abs(unit_rows(alone) - unit_rows(embeddings[some])).max()),
        evaluation=evaluation,
    )
    if graph.batch_invariant and not certificate.max_batch_difference <= _BATCH_TOLERANCE:
        raise CertificateError(
            f"the {graph.precision} graph gives a text another vector among others than alone: they differ by "
            f"{certificate.max_batch_difference:.1e}. Nothing was published; please report it"
        )
    if graph.precision == "fp32":
        if not max(certificate.max_abs_difference, certificate.max_norm_difference) <= certificate.tolerance:
            raise CertificateError(
                f"the fp32 graph does not agree with {certificate.reference}: unit vectors differ by up to "
                f"{certificate.max_abs_difference:.1e}, norms by {certificate.max_norm_difference:.1e}, allowed are "
                f"{certificate.tolerance:.0e}. Nothing was published. The checkpoint does something that the exporter "
                "does not know; please report it with the checkpoint's config.json"
            )
        return certificate
    losses = _losses(certificate)
    if losses and not accept_accuracy:
        raise CertificateError(
            f"the {graph.precision} graph {' and '.join(losses)}. Nothing was published. Convert with --precision "
            "fp32, calibrate on texts of your own with --calibration FILE, or take it with --accept-accuracy"
        )
    return dataclasses.replace(certificate, accepted=bool(losses))


def _losses(certificate: Certificate) -> list[str]:
    """Say what a quantised graph loses beyond what is allowed."""
    losses = []
    if not 1 - certificate.min_cosine <= certificate.tolerance:
        losses.append(
            f"turns a text to a cosine of {certificate.min_cosine:.5f} (mean {certificate.mean_cosine:.5f}), allowed "
            f"are {1 - certificate.tolerance:.4g}"
        )
    evaluation = certificate.evaluation
    if evaluation is not None and not evaluation.reference_spearman - evaluation.spearman <= _SPEARMAN_LOSS:
        losses.append(
            f"lowers Spearman's correlation on your pairs from {evaluation.reference_spearman:.4f} to "
            f"{evaluation.spearman:.4f}, allowed are {_SPEARMAN_LOSS}"
        )
    if evaluation is not None and not evaluation.top10_overlap >= _TOP10_OVERLAP:
        losses.append(
            f"keeps {evaluation.top10_overlap:.3f} of the ten nearest neighbours, allowed are {_TOP10_OVERLAP}"
        )
    return losses


def compare(
    embeddings: npt.NDArray[np.float32],
    expected: npt.NDArray[np.float64],
    n_tokens: npt.NDArray[np.int64],
    reference: str,
    tolerance: float,
) -> Certificate:
    """Measure embeddings (n, dim) against the reference's (n, dim), in float64; the rest is left for the caller."""
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
        p1_cosine=float(np.percentile(cosines, 1)),
        min_cosine=float(cosines.min()),
        max_abs_difference=float(np.abs(unit - expected_unit).max()),
        max_norm_difference=float(np.abs(norms / expected_norms - 1).max()),
        max_batch_difference=0.0,
        tolerance=tolerance,
        accepted=False,
        evaluation=None,
    )
