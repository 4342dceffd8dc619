from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from m3e import CertificateError, Encoder, ExportError
from m3e.manifest import Evaluation
from m3e_export import certify
from m3e_export.evaluate import neighbour_overlap, read_pairs, spearman
from m3e_export.pipeline import convert


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    rows = [f"第{i}个句子。\t第{i * 7 % 50}个问题。\t{i % 6}" for i in range(50)]
    path.write_text("sentence1\tsentence2\tscore\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_the_certificate_of_each_graph_carries_the_figures(
    tiny_checkpoint: Path, few_texts: Path, tmp_path: Path, pairs: Path
) -> None:
    manifest = convert(
        str(tiny_checkpoint), tmp_path / "out", precisions=("fp32", "int8"), evaluation=pairs, calibration=few_texts
    )
    fp32, int8 = (graph.certificate for graph in manifest.graphs)
    assert fp32 is not None
    assert int8 is not None
    assert fp32.evaluation is not None
    assert (fp32.evaluation.n_pairs, fp32.evaluation.n_texts) == (50, 100)
    assert fp32.evaluation.spearman == pytest.approx(fp32.evaluation.reference_spearman, abs=1e-6)
    assert fp32.evaluation.top10_overlap == 1.0
    assert int8.evaluation is not None
    assert int8.evaluation.reference_spearman == fp32.evaluation.reference_spearman
    assert 0.8 < int8.evaluation.top10_overlap < 1.0
    assert int8.min_cosine <= int8.p1_cosine <= int8.mean_cosine < 1
    assert fp32.max_batch_difference <= 1e-6
    assert int8.max_batch_difference <= 1e-6


def test_ranking_that_is_lost_is_refused_or_accepted_and_recorded(
    tiny_checkpoint: Path, few_texts: Path, tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certify, "_TOP10_OVERLAP", 1.0)
    make = functools.partial(
        convert, str(tiny_checkpoint), tmp_path / "out", precisions=("int8",), evaluation=pairs, calibration=few_texts
    )
    with pytest.raises(CertificateError, match=r"of the ten nearest neighbours.*--accept-accuracy"):
        make()
    manifest = make(accept_accuracy=True)
    assert manifest.graphs[0].certificate is not None
    assert manifest.graphs[0].certificate.accepted


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"min_cosine": 0.9}, ["cosine of 0.9000"]),
        ({"evaluation": Evaluation(n_pairs=9, n_texts=9, reference_spearman=0.8, spearman=0.79, top10_overlap=0.95)},
         ["from 0.8000 to 0.7900"]),
        ({"evaluation": Evaluation(n_pairs=9, n_texts=9, reference_spearman=0.8, spearman=0.81, top10_overlap=0.8)},
         ["0.800 of the ten"]),
        ({"min_cosine": float("nan")}, ["cosine of nan"]),
    ],
    ids=["fine", "cosine", "spearman", "neighbours", "not a number"],
)  # fmt: skip
def test_each_loss_is_named(change: dict[str, object], expected: list[str]) -> None:
    vectors = np.eye(4, dtype=np.float32)
    fine = certify.compare(vectors, vectors.astype(np.float64), np.array([3]), "itself", 0.03)
    losses = certify._losses(dataclasses.replace(fine, **change))  # type: ignore[arg-type]
    assert len(losses) == len(expected)
    assert all(part in loss for part, loss in zip(expected, losses, strict=True))


def test_vectors_that_depend_on_the_batch_are_refused_unless_the_graph_says_so(tiny_bundle: Path) -> None:
    expected = np.random.default_rng(0).standard_normal((60, 8))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    texts = [str(i) for i in range(60)]
    reference = certify.References(texts, np.ones(60, np.int64), expected, (), expected[:0])

    def encode(some: Sequence[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        moved = expected[[int(text) for text in some]] + 1.5e-6 * (len(some) > 1)  # within the tolerance of fp32
        return moved.astype(np.float32)

    graph = Encoder(tiny_bundle, precision="fp32").manifest.graphs[0]
    assert graph.batch_invariant
    with pytest.raises(CertificateError, match="another vector among others than alone"):
        certify.certify(encode, graph, reference)
    certificate = certify.certify(encode, dataclasses.replace(graph, batch_invariant=False), reference)
    assert 1e-6 < certificate.max_batch_difference < 5e-6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "UTF-8"),
        (b"a\tb\t1\n", "1 pairs, expected at least 20"),
        (b"a\tb\t1\n" * 30, "more than one label"),
        (b"a\tb\t1\n" * 20 + b"a\tb\n", r"line 21 .*'a\\tb', expected sentence1"),
        (b"a\tb\t1\n" * 20 + b"a\tb\tgood\n", "line 21"),
    ],
    ids=["bytes", "few", "one label", "columns", "label"],
)
def test_a_file_that_cannot_serve(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "pairs").write_bytes(content)
    with pytest.raises(ExportError, match=message):
        read_pairs(tmp_path / "pairs")


def test_spearman_with_ties() -> None:
    """Worked by hand: ranks 1 2.5 2.5 4 against 1 3 2 4."""
    assert spearman(np.array([1.0, 2, 2, 9]), np.array([0.1, 0.8, 0.7, 3])) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_overlap_against_a_slow_one() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((700, 8))  # more than one block
    b = a + 0.2 * rng.standard_normal(a.shape)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def nearest(x: np.ndarray[tuple[int, ...], np.dtype[np.float64]], i: int) -> set[int]:
        return set(sorted((j for j in range(len(x)) if j != i), key=lambda j: -float(x[i] @ x[j]))[:10])

    slow = np.mean([len(nearest(a, i) & nearest(b, i)) / 10 for i in range(700)])
    assert neighbour_overlap(a, b) == pytest.approx(slow)
