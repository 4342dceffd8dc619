"""Against sentence-transformers with PyTorch in FP32: the same ids and the same vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.checkpoints import write_checkpoint
from m3e import Encoder
from m3e_export.pipeline import convert
from tests.datasets import stsb_sentences

# The longest texts are meant to be cut, by both.
pytestmark = pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")

TOLERANCE = 2e-6  # largest difference of a component of unit vectors


def largest_difference(checkpoint: Path, encoder: Encoder, texts: list[str]) -> float:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(checkpoint), device="cpu")
    expected = model.encode(texts, normalize_embeddings=True, batch_size=32)
    return float(np.abs(encoder.encode(texts, normalize_embeddings=True) - expected).max())


def sets(sentences: list[str], data_dir: Path | None, stride: int) -> list[str]:
    """The shipped corpus, and STS-B in both languages where it can be had; every stride-th text of each."""
    texts = [text for text in sentences if len(text) < 300][::stride]
    if data_dir is not None:
        texts += stsb_sentences(data_dir, "zh")[::stride] + stsb_sentences(data_dir, "en")[::stride]
    return texts


def test_minilm(minilm_checkpoint: Path, minilm_encoder: Encoder, sentences: list[str], data_dir: Path | None) -> None:
    texts = sets(sentences, data_dir, 8)
    assert largest_difference(minilm_checkpoint, minilm_encoder, texts) <= TOLERANCE


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ("small", 96),
        pytest.param("small", 1, marks=pytest.mark.long),
        pytest.param("base", 24, marks=pytest.mark.long),
        pytest.param("base", 1, marks=[pytest.mark.soak, pytest.mark.timeout(3000)]),
        pytest.param("large", 4, marks=[pytest.mark.soak, pytest.mark.timeout(3000)]),
    ],
)
def test_m3e_shapes(shape: str, stride: int, sentences: list[str], data_dir: Path | None, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / f"m3e-{shape}", shape)
    convert(str(checkpoint), tmp_path / "bundle")
    texts = sets(sentences, data_dir, stride)
    assert largest_difference(checkpoint, Encoder(tmp_path / "bundle"), texts) <= TOLERANCE
