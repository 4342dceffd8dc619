"""The map is isotonic regression's, the threshold keeps its promise, and the bundle's side file cannot lie."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from benchmarks.server_process import running
from m3e import BundleError, Encoder, InputError
from m3e.bundle import SIDE_NAME, Bundle
from m3e.calibration import Calibration, fit
from m3e.cli.main import main

PAIRS = [
    ("The weather is lovely today", "It is lovely weather today", 1),
    ("How do I reset my password?", "I forgot my password", 1),
    ("I want to return a product", "How can I return a product?", 1),
    ("What does the apple cost?", "What is the price of the apple?", 1),
    ("A cat is sleeping", "The cat sleeps", 1),
    ("The weather is lovely today", "How do I reset my password?", 0),
    ("I want to return a product", "A cat is sleeping", 0),
    ("Where is the station?", "I am hungry", 0),
    ("Stock prices rose", "We go hiking tomorrow", 0),
    ("Open the door", "What does the apple cost?", 0),
] * 2


def learnt(scores: object, labels: object, precision: float = 0.5) -> Calibration:
    return fit(scores, labels, precision=precision, space_id="s", similarity_fn_name="cosine")  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(-50, 50), st.booleans()), min_size=20, max_size=80))
def test_the_map_is_isotonic_regression(pairs: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([score / 50 for score, _ in pairs]), np.array([label for _, label in pairs])
    if labels.all() or not labels.any():
        with pytest.raises(InputError, match="of both kinds"):
            learnt(scores, labels)
        return
    calibration = learnt(scores, labels, precision=labels.mean() / 2)
    reference = IsotonicRegression(out_of_bounds="clip").fit(scores, labels)
    grid = np.linspace(-1.5, 1.5, 301)
    np.testing.assert_allclose(calibration(grid), reference.predict(grid), atol=1e-6)
    assert (np.diff(calibration(grid)) >= 0).all()
    assert ((calibration(grid) >= 0) & (calibration(grid) <= 1)).all()


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=20, max_size=60), st.floats(0.05, 1))
def test_the_threshold_is_the_lowest_with_the_precision(pairs: list[tuple[int, bool]], precision: float) -> None:
    scores, labels = np.array([float(score) for score, _ in pairs]), np.array([label for _, label in pairs])
    if labels.all() or not labels.any():
        return
    good = [score for score in sorted(set(scores)) if labels[scores >= score].mean() >= precision]
    if good:
        calibration = learnt(scores, labels, precision)
        assert calibration.threshold == good[0]
        assert calibration.recall == pytest.approx(labels[scores >= good[0]].sum() / labels.sum())
    else:
        with pytest.raises(InputError, match="no threshold gives a precision of"):
            learnt(scores, labels, precision)


@pytest.fixture
def calibrated(minilm_encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = Path(shutil.copytree(minilm_encoder._folder, tmp_path / "bundle"))
    (tmp_path / "pairs.tsv").write_text("".join(f"{a}\t{b}\t{label}\n" for a, b, label in PAIRS), encoding="utf-8")
    assert main(["calibrate", str(folder), str(tmp_path / "pairs.tsv"), "--precision", "0.8"]) == 0
    assert "20 pairs, 10 of the same meaning" in capsys.readouterr().out
    return folder


def test_the_folder_may_be_the_current_one(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = (calibrated / "similarity.json").read_bytes()
    (calibrated / "similarity.json").unlink()
    monkeypatch.chdir(calibrated)
    assert main(["calibrate", ".", str(calibrated.parent / "pairs.tsv"), "--precision", "0.8"]) == 0
    assert (calibrated / "similarity.json").read_bytes() == known


def test_the_server_gives_the_same_probabilities(calibrated: Path) -> None:
    encoder, texts = Encoder(calibrated), ["A cat is sleeping", "The cat sleeps", "What does the apple cost?"]
    vectors = encoder.encode(texts)
    inputs = {"source_sentence": texts[0], "sentences": texts[1:]}
    with running(calibrated, "--max-batch-tokens", "64") as server:  # small, for a short warm-up
        cosines = server.post("/similarity", {"inputs": inputs}).json
        scores = server.post("/similarity", {"inputs": inputs, "parameters": {"calibrated": True}}).json
    np.testing.assert_allclose(cosines, encoder.similarity(vectors[0], vectors[1:])[0], atol=1e-6)
    expected = encoder.similarity(vectors[0], vectors[1:], calibrated=True)[0]
    np.testing.assert_allclose(scores, expected, atol=1e-4)  # the map may be steep
    assert scores != cosines


def test_calibrate_then_compare(calibrated: Path) -> None:
    encoder = Encoder(calibrated)
    assert encoder.calibration is not None
    vectors = encoder.encode([text for a, b, _ in PAIRS for text in (a, b)])
    plain, mapped = encoder.similarity(vectors, vectors), encoder.similarity(vectors, vectors, calibrated=True)
    np.testing.assert_array_equal(mapped, encoder.calibration(plain))
    above = np.diagonal(plain[::2, 1::2]) >= encoder.calibration.threshold
    assert np.array([label for _, _, label in PAIRS])[above].mean() >= 0.8
    Bundle(calibrated).verify()


def test_a_bundle_without_says_what_to_run(tiny_encoder: Encoder) -> None:
    with pytest.raises(InputError, match="is not calibrated; run: m3e calibrate"):
        tiny_encoder.similarity([[1.0] * 64], [[1.0] * 64], calibrated=True)


def test_the_side_file_cannot_lie(calibrated: Path, tmp_path: Path) -> None:
    side = calibrated / SIDE_NAME
    data = side.read_bytes()
    for at in range(0, len(data), 37):
        side.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BundleError, match="calibrat"):
            Encoder(calibrated)._folder  # noqa: B018
    content = json.loads(data)
    other = Calibration(**{name: content[name] for name in Calibration.__slots__} | {"space_id": "another"})
    side.write_bytes(other.to_bytes())
    with pytest.raises(BundleError, match="the calibration is of another cosine and the bundle is"):
        Encoder(calibrated)
    side.unlink()
    (tmp_path / "elsewhere").write_bytes(data)
    side.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="links are refused"):
        Encoder(calibrated)
    side.unlink()
    os.link(tmp_path / "elsewhere", side)
    with pytest.raises(BundleError, match="not a plain file of its own"):
        Encoder(calibrated)


def test_only_that_one_file_may_come_later(calibrated: Path) -> None:
    (calibrated / "onnx" / SIDE_NAME).write_bytes((calibrated / SIDE_NAME).read_bytes())
    with pytest.raises(BundleError, match=r"onnx/similarity\.json is not in the manifest"):
        Bundle(calibrated)


@pytest.mark.parametrize("line", [b"a\tb\n", b"a\tb\tyes\n", b"\xff\tb\t1\n"])
def test_bad_pairs(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes) -> None:
    (tmp_path / "pairs.tsv").write_bytes(b"a\tb\t1\n" + line)
    assert main(["calibrate", str(tiny_bundle), str(tmp_path / "pairs.tsv")]) == 2
    assert "error: line 2 of " in capsys.readouterr().err
