"""The bundle's folder: whatever is wrong in it is found and named before any of it is used."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from m3e import BundleError, Encoder
from m3e.bundle import Bundle
from m3e.manifest import File, Manifest


def empty_graph(name: str) -> bytes:
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", 64])
    graph = helper.make_graph([], name, [], [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


# Graphs that nobody runs; of one size, so that only their hashes tell them apart.
GRAPHS = {"fp32": empty_graph("one"), "int8": empty_graph("two")}
NAMES = ["config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json", "onnx/fp32.onnx", "onnx/int8.onnx"]


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of its own for every test, with two graphs of few bytes."""
    target = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, target, ignore=shutil.ignore_patterns("*.onnx"))
    for precision, data in GRAPHS.items():
        (target / f"onnx/{precision}.onnx").write_bytes(data)
    manifest = Manifest.from_bytes((target / "manifest.json").read_bytes())
    graphs = [dataclasses.replace(manifest.graphs[0], file=f"onnx/{name}.onnx", precision=name) for name in GRAPHS]
    declare(target, graphs=tuple(graphs))
    return target


def declare(folder: Path, *more: str, **changes: object) -> None:
    """Write a manifest, in itself correct, of the files that are there and of some more names."""
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = {name: (folder / name).read_bytes() for name in {*paths, *more} - {"manifest.json"}}
    listed = {name: File(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    sealed = dataclasses.replace(manifest, files=listed, **changes)  # type: ignore[arg-type]
    (folder / "manifest.json").write_bytes(sealed.to_bytes())


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Graphs that got as far as onnxruntime; none does any work there."""
    graphs: list[bytes] = []

    def session(model: bytes, **_: object) -> None:
        graphs.append(model)
        raise InterruptedError

    monkeypatch.setattr("m3e.backends.Session", session)
    return graphs


def elsewhere(path: Path) -> Path:
    """A place outside the bundle, on the same file system."""
    return next(parent for parent in path.parents if parent.name == "bundle").with_name("elsewhere")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    path.symlink_to(path.rename(elsewhere(path)))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "missing": Path.unlink,
    "link": link,
    "hard link": lambda path: os.link(path, elsewhere(path)),
    "pipe": pipe,
    "folder": directory,
}


def test_an_undamaged_bundle_is_accepted(folder: Path, opened: list[bytes]) -> None:
    bundle = Bundle(folder)
    bundle.verify()
    assert {name: bundle.read(name) for name in NAMES} == {name: (folder / name).read_bytes() for name in NAMES}
    for precision in GRAPHS:
        with pytest.raises(InterruptedError):
            Encoder(folder, precision=precision)
    assert opened == list(GRAPHS.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(folder: Path, damage: str, name: str) -> None:
    opened_before = Bundle(folder)
    DAMAGES[damage](folder / name)
    for check in (lambda: Bundle(folder).verify(), opened_before.verify, lambda: opened_before.read(name)):
        with pytest.raises(BundleError, match=name) as caught:
            check()
        assert str(folder) in str(caught.value)
        assert "convert the checkpoint again, or copy the bundle again" in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused(folder: Path, damage: str) -> None:
    DAMAGES[damage](folder / "manifest.json")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "onnx/fp32.onnx"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_onnxruntime_never_sees_a_damaged_bundle(folder: Path, opened: list[bytes], damage: str, name: str) -> None:
    DAMAGES[damage](folder / name)
    with pytest.raises(BundleError, match=name):
        Encoder(folder, precision="fp32")
    assert opened == []


def test_a_pipe_for_an_empty_file_is_refused(folder: Path) -> None:
    (folder / "empty").touch()
    declare(folder)
    Bundle(folder).verify()
    pipe(folder / "empty")
    with pytest.raises(BundleError, match=r"empty' is not a plain file of its own \(a link, pipe or device\)"):
        Bundle(folder).verify()


def test_swapped_graphs_are_refused(folder: Path, opened: list[bytes]) -> None:
    (folder / "onnx/fp32.onnx").write_bytes(GRAPHS["int8"])
    (folder / "onnx/int8.onnx").write_bytes(GRAPHS["fp32"])
    for precision in GRAPHS:
        with pytest.raises(BundleError, match=rf"onnx/{precision}\.onnx' is damaged"):
            Encoder(folder, precision=precision)
    assert opened == []


@pytest.mark.parametrize("name", ["extra.txt", ".hidden", "onnx/model.onnx.data", "new/folder/file"])
def test_an_extra_file_is_named(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(BundleError, match=f"{name} is not in the manifest"):
        Bundle(folder)


def test_linked_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "extra").symlink_to(tmp_path)
    shutil.move(folder / "onnx", tmp_path / "onnx")
    (folder / "onnx").symlink_to(tmp_path / "onnx")
    with pytest.raises(BundleError, match=r"onnx/fp32\.onnx is missing.* extra is not in the manifest; onnx is not"):
        Bundle(folder)


def test_all_problems_are_in_one_message(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    (folder / "extra").touch()
    DAMAGES["longer"](folder / "config.json")
    with pytest.raises(BundleError, match=r"vocab.txt is missing; extra is not .*; config.json has \d+ bytes, the"):
        Bundle(folder)


@pytest.mark.parametrize("name", ["../secret", "{}/secret", "onnx/../../secret", "onnx/../vocab.txt", "./vocab.txt"])
def test_a_name_outside_the_folder_is_refused(folder: Path, tmp_path: Path, opened: list[bytes], name: str) -> None:
    name = name.format(tmp_path)
    (tmp_path / "secret").write_bytes(b"secret")
    graph = Bundle(folder).manifest.graphs[0]
    declare(folder, name)
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle(folder)
    declare(folder, graphs=(dataclasses.replace(graph, file=name),))
    with pytest.raises(BundleError, match=f"graph {name} is not among the files"):
        Encoder(folder)
    assert opened == []


def test_a_manifest_that_lists_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    declare(folder)
    with pytest.raises(BundleError, match=r"has no tokenizer\.json among its manifest's files"):
        Encoder(folder)


def test_what_is_no_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(BundleError, match=rf"no bundle at '{path}': there is no such folder; make one .*convert"):
            Bundle(path)
    for path in (tiny_checkpoint, tmp_path):
        with pytest.raises(BundleError, match=f"'{path}' is not a bundle: .* checkpoint, convert it: .*{path}"):
            Bundle(path)
