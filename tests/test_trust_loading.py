"""Damaged and hostile bundles: refused before onnxruntime sees a byte, with the file's name."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from m3e import BundleError, CheckpointError, Encoder
from m3e.bundle import Bundle
from m3e.tokenizer_check import check_tokenizer
from m3e_export.pipeline import convert
from tests.trust import flips, hostile, hostile_checkpoints


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of its own for every test."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Graphs that got as far as onnxruntime; none does any work there."""
    graphs: list[bytes] = []

    def session(model: bytes, **_: object) -> None:
        graphs.append(model)
        raise InterruptedError

    monkeypatch.setattr("m3e.backends.Session", session)
    return graphs


@pytest.mark.parametrize("n", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_a_flipped_byte_is_refused(folder: Path, n: int) -> None:
    assert flips.flip(folder, n) == []
    Bundle(folder).verify()


@pytest.mark.parametrize("n", [40, pytest.param(256, marks=pytest.mark.long)])
def test_a_file_that_was_cut_is_refused(folder: Path, n: int) -> None:
    assert flips.truncate(folder, n) == []
    Bundle(folder).verify()


def test_a_loader_without_hashes_is_caught(folder: Path) -> None:
    survivors = flips.flip(folder, 20, load=flips.without_hashes)
    assert len(survivors) > 10
    assert any("onnx/model.onnx, byte" in line and line.endswith("not refused") for line in survivors)


@pytest.mark.parametrize("name", hostile.GRAPHS)
def test_a_hostile_graph_is_refused(folder: Path, opened: list[bytes], name: str) -> None:
    change, message = hostile.GRAPHS[name]
    hostile.replace_graph(folder, change)
    Bundle(folder).verify()  # the manifest is right about every file
    with pytest.raises(BundleError, match=message) as caught:
        Encoder(folder)
    assert str(caught.value).startswith("onnx/model.onnx is refused before it is opened")
    assert opened == []


@pytest.mark.parametrize("name", hostile.MANIFESTS)
def test_a_hostile_manifest_is_refused(folder: Path, opened: list[bytes], name: str) -> None:
    change, message = hostile.MANIFESTS[name]
    hostile.replace_manifest(folder, change)
    with pytest.raises(BundleError, match=re.escape(f"manifest.json.{message}")):
        Encoder(folder)
    assert opened == []


@pytest.mark.parametrize("name", hostile.TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(
    folder: Path, opened: list[bytes], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = hostile.TOKENIZERS[name]
    hostile.replace_tokenizer(folder, change)
    Bundle(folder).verify()  # the manifest is right about every file
    monkeypatch.delattr("tokenizers.Tokenizer")  # the library sees none of it
    with pytest.raises(BundleError, match=rf"tokenizer\.json is refused before it is opened: .*{re.escape(message)}"):
        Encoder(folder)
    assert opened == []


def test_a_tokenizer_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read: a key is there twice"):
        check_tokenizer(b'{"model": {}, "normalizer": {"type": "NFC"}, "normalizer": null}', 10)


def test_a_loader_without_the_check_is_caught(
    folder: Path, opened: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m3e.bundle.check_graph", lambda data, graph: None)
    hostile.replace_graph(folder, hostile.GRAPHS["external file, absolute"][0])
    with pytest.raises(InterruptedError):
        Encoder(folder)
    assert len(opened) == 1


def test_the_graphs_of_the_exporter_pass(gpu_bundle: Path) -> None:
    bundle = Bundle(gpu_bundle)
    for graph in bundle.manifest.graphs:
        assert bundle.read_graph(graph) == bundle.read(graph.file)


_opened_files: list[str] | None = None


def _record(event: str, arguments: tuple[object, ...]) -> None:
    if _opened_files is not None and event in ("open", "os.listdir", "os.scandir", "subprocess.Popen", "os.system"):
        _opened_files.append(str(arguments[0]))


@pytest.fixture
def touched() -> Iterator[list[str]]:
    """Files that Python opens, folders that it lists and programs that it starts."""
    global _opened_files
    if _opened_files is None:
        sys.addaudithook(_record)
    _opened_files = []
    yield _opened_files
    _opened_files = None


@pytest.mark.parametrize("name", hostile_checkpoints.CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused(tiny_checkpoint: Path, tmp_path: Path, touched: list[str], name: str) -> None:
    folder, outside = tmp_path / "case" / "m3e-tiny", tmp_path / "outside"
    shutil.copytree(tiny_checkpoint, folder)
    outside.mkdir()
    (outside / "secret").write_text("secret")
    change, message = hostile_checkpoints.CHECKPOINTS[name]
    change(folder, outside / "secret")
    touched.clear()
    with pytest.raises(CheckpointError, match=message):
        convert(str(folder), tmp_path / "bundle")
    assert not [path for path in touched if path.startswith((str(outside), "/etc"))]
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert not list(tmp_path.rglob("canary"))
    assert not (tmp_path / "bundle").exists()


def test_what_is_opened_outside_is_recorded(tmp_path: Path, touched: list[str]) -> None:
    (tmp_path / "secret").touch()
    (tmp_path / "secret").read_bytes()
    assert str(tmp_path / "secret") in touched
