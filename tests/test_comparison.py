from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.checkpoints import write_checkpoint
from m3e import Encoder, InputError
from m3e.cli.main import main
from m3e.comparison import compare
from m3e.vectors import Float32Array
from m3e_export.pipeline import convert


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other random weights."""
    folder = tmp_path_factory.mktemp("other")
    convert(str(write_checkpoint(folder / "checkpoint", seed=1)), folder / "bundle")
    return folder / "bundle"


def slow_overlap(a: Float32Array, b: Float32Array) -> float:
    shares = []
    for i, query in enumerate(a):
        rank = [
            sorted((j for j in range(len(a)) if j != i), key=lambda j: -float(query @ vectors[j]))[:10]
            for vectors in (a, b)
        ]
        shares.append(len(set(rank[0]) & set(rank[1])) / 10)
    return float(np.mean(shares))


def test_a_bundle_and_itself(tiny_encoder: Encoder, sentences: list[str]) -> None:
    found = compare(tiny_encoder, tiny_encoder, sentences[:40])
    assert found.same_space
    assert found.neighbour_overlap == 1
    assert found.min_cosine == pytest.approx(1, abs=1e-6)


def test_figures_of_different_models(tiny_encoder: Encoder, other: Path, sentences: list[str]) -> None:
    second, texts = Encoder(other), [*sentences[:40], sentences[0]]
    found = compare(tiny_encoder, second, texts)
    a, b = (encoder.encode(texts[:40], normalize_embeddings=True) for encoder in (tiny_encoder, second))
    cosines = [float(x @ y) for x, y in zip(a, b, strict=True)]
    assert not found.same_space
    assert found.n_texts == 40
    assert found.mean_cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found.worst_text == texts[int(np.argmin(cosines))]
    assert found.neighbour_overlap == pytest.approx(slow_overlap(a, b))
    assert slow_overlap(a, b) < 0.9  # or the models are too alike to show anything


def test_models_of_different_size(tiny_encoder: Encoder, minilm_encoder: Encoder) -> None:
    found = compare(tiny_encoder, minilm_encoder, ["a", "b"])
    assert (found.same_space, found.min_cosine, found.neighbour_overlap) == (False, None, None)


def test_no_texts(tiny_encoder: Encoder) -> None:
    with pytest.raises(InputError, match="no texts to compare on"):
        compare(tiny_encoder, tiny_encoder, [])


def test_the_command_on_one_space(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tiny_bundle), str(tiny_bundle)]) == 0
    out = capsys.readouterr().out
    assert ": equal\n" in out
    assert "worst 1.000000" in out


def test_the_command_on_two_spaces(
    tiny_bundle: Path, other: Path, tmp_path: Path, sentences: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").write_text("\n".join(sentences[:20]), encoding="utf-8")
    assert main(["compare", str(tiny_bundle), str(other), "--texts", str(tmp_path / "texts")]) == 1
    captured = capsys.readouterr()
    assert ": different\n" in captured.out
    assert "nearest 10" in captured.out
    assert "may not be mixed" in captured.err


@pytest.mark.parametrize(("content", "reason"), [(b"\n \n", "holds no texts"), (b"\xff", "not UTF-8 at byte 0")])
def test_a_bad_file_of_texts(
    tiny_bundle: Path, tmp_path: Path, content: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").write_bytes(content)
    assert main(["compare", str(tiny_bundle), str(tiny_bundle), "--texts", str(tmp_path / "texts")]) == 2
    assert reason in capsys.readouterr().err
