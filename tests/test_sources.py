"""Checkpoints from folders, and from stand-ins of the hubs on this machine with the hubs' real clients."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from m3e import CheckpointError, DependencyError, Encoder
from m3e_export.pipeline import convert
from m3e_export.sources import fetch_checkpoint
from tests.hubs import MAIN, NEWER, OLDER, PICKLED, REPO, Hub, ModelScope, names, run, serving

# As on a machine without PyTorch, whose import would take longer than all the rest.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "
CONVERT = str(Path(__file__).parents[1] / "export" / "convert.py")
CONVERT_CODE = f"{WITHOUT_TORCH}import runpy; runpy.run_path({CONVERT!r}, run_name='__main__')"


def fetch(
    home: Path, hub: Hub | ModelScope, repo: str, revision: str | None, *, offline: bool = False
) -> tuple[Path, str]:
    code = f"import sys; sys.path[:] = {sys.path!r}; from m3e_export.sources import fetch_checkpoint"
    code += f"; found = fetch_checkpoint({repo!r}, {revision!r}); print(found.folder, found.revision)"
    done = run(home, hub, "-c", code, offline=offline)
    assert done.returncode == 0, done.stderr
    folder, found = done.stdout.split()
    return Path(folder), found


@pytest.mark.checkout
def test_an_id_converts_and_converts_again_from_the_cache(hub: Hub, tiny_bundle: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    command = ["-c", CONVERT_CODE, REPO, "--precision", "fp32", "-o"]
    done = run(tmp_path / "home", hub, *command, str(first))
    assert done.returncode == 0, done.stderr
    source = Encoder(first).manifest.source
    assert (source.id, source.revision) == (REPO, MAIN)
    assert (first / "onnx" / "model.onnx").read_bytes() == (tiny_bundle / "onnx" / "model.onnx").read_bytes()
    hub.stop()
    done = run(tmp_path / "home", hub, *command, str(again), offline=True)
    assert done.returncode == 0, done.stderr
    assert (again / "manifest.json").read_bytes() == (first / "manifest.json").read_bytes()


@pytest.mark.checkout
def test_pickled_weights_of_a_revision_convert(hub: Hub, tiny_bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    done = run(tmp_path / "home", hub, CONVERT, PICKLED, "--revision", "v1", "--precision", "fp32", "-o", str(target))
    assert done.returncode == 0, done.stderr
    assert Encoder(target).manifest.source.revision == MAIN
    assert (target / "onnx" / "model.onnx").read_bytes() == (tiny_bundle / "onnx" / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("repo", "revision", "commit", "weights"),
    [
        pytest.param(REPO, None, MAIN, "model.safetensors", id="default branch"),
        pytest.param(REPO, "v1", OLDER, "model.safetensors", id="tag"),
        pytest.param(REPO, OLDER, OLDER, "model.safetensors", id="commit"),
        pytest.param(PICKLED, "v1", MAIN, "pytorch_model.bin", id="pickled"),
    ],
)
def test_what_is_downloaded(
    hub: Hub, tiny_checkpoint: Path, tmp_path: Path, repo: str, revision: str | None, commit: str, weights: str
) -> None:
    folder, found = fetch(tmp_path, hub, repo, revision)
    expected = names(tiny_checkpoint) - {"model.safetensors"} | {weights}
    assert found == commit
    assert hub.downloads == {(repo, name) for name in expected}
    assert names(folder) == expected


def test_a_push_during_the_download_does_not_mix_commits(hub: Hub, tmp_path: Path) -> None:
    hub.refs[PICKLED, "main"], hub.moves = MAIN, {(PICKLED, "main"): NEWER}
    folder, found = fetch(tmp_path, hub, PICKLED, None)
    assert hub.refs[PICKLED, "main"] == NEWER
    assert found == MAIN
    assert (folder / "pytorch_model.bin").is_file()


@pytest.mark.checkout
@pytest.mark.parametrize(
    ("arguments", "offline", "reason"),
    [
        pytest.param([REPO], True, "HF_HUB_OFFLINE", id="offline without a cache"),
        pytest.param(["some-org/unknown"], False, "'some-org/unknown'", id="unknown id"),
        pytest.param([REPO, "--revision", "v9"], False, f"'{REPO}@v9'", id="unknown revision"),
        pytest.param([PICKLED], False, "pytorch_model.bin", id="no weights"),
    ],
)
def test_a_failure_is_a_message(hub: Hub, tmp_path: Path, arguments: list[str], offline: bool, reason: str) -> None:
    target = tmp_path / "bundles" / "tiny"
    done = run(tmp_path / "home", hub, CONVERT, *arguments, "-o", str(target), offline=offline)
    assert done.returncode == 1
    assert "error: cannot read" in done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.parent.exists()


@pytest.fixture
def modelscope(tiny_checkpoint: Path) -> Iterator[ModelScope]:
    files = {name: (tiny_checkpoint / name).read_bytes() for name in names(tiny_checkpoint)}
    with serving(ModelScope(files | {"README.md": b"x", "pytorch_model.bin": b"x"})) as server:
        yield server


@pytest.mark.checkout
def test_a_model_of_modelscope_converts_and_is_found_again(
    modelscope: ModelScope, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    command = ["-c", CONVERT_CODE, f"modelscope:{REPO}", "--precision", "fp32", "-o", str(first)]
    done = run(tmp_path / "home", modelscope, *command)
    assert done.returncode == 0, done.stderr
    assert set(modelscope.downloads) == names(tiny_checkpoint)
    source = Encoder(first).manifest.source
    assert source.id == f"modelscope:{REPO}"
    assert source.revision is not None
    assert re.fullmatch("master-[0-9a-f]{12}", source.revision)
    assert (first / "onnx" / "model.onnx").read_bytes() == (tiny_bundle / "onnx" / "model.onnx").read_bytes()
    config = modelscope.files["config.json"]
    modelscope.files["config.json"] = config + b" "  # a push to the branch
    assert fetch(tmp_path / "home", modelscope, f"modelscope:{REPO}", None)[1] != source.revision
    modelscope.files["config.json"] = config
    assert fetch(tmp_path / "home", modelscope, f"modelscope:{REPO}", None)[1] == source.revision
    modelscope.shutdown()
    folder, revision = fetch(tmp_path / "home", modelscope, f"modelscope:{REPO}", None, offline=True)
    assert (names(folder), revision) == (names(tiny_checkpoint), source.revision)


@pytest.mark.checkout
@pytest.mark.parametrize(
    ("arguments", "offline", "reason"),
    [
        pytest.param([f"modelscope:{REPO}"], True, "HF_HUB_OFFLINE", id="offline without a cache"),
        pytest.param(["modelscope:some-org/unknown"], False, "'some-org/unknown@master'", id="unknown id"),
        pytest.param([f"modelscope:{REPO}", "--revision", "v9"], False, f"'{REPO}@v9'", id="unknown revision"),
    ],
)
def test_a_failure_of_modelscope_is_a_message(
    modelscope: ModelScope, tmp_path: Path, arguments: list[str], offline: bool, reason: str
) -> None:
    target = tmp_path / "bundles" / "tiny"
    done = run(tmp_path / "home", modelscope, CONVERT, *arguments, "-o", str(target), offline=offline)
    assert done.returncode == 1
    assert "error: cannot read" in done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.parent.exists()


def test_a_folder_of_links_into_a_read_only_cache(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(tiny_checkpoint, blobs)
    for name in names(blobs):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / name)
    for path in [*blobs.rglob("*"), blobs, *snapshot.rglob("*"), snapshot]:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.lstat().st_mtime_ns for path in (*blobs.rglob("*"), *snapshot.rglob("*"))}
    try:
        convert(str(snapshot), tmp_path / "bundle")
    finally:
        for path in (blobs, snapshot, *blobs.rglob("*"), *snapshot.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
    assert {path: path.lstat().st_mtime_ns for path in (*blobs.rglob("*"), *snapshot.rglob("*"))} == before
    assert (tmp_path / "bundle/onnx/model.onnx").read_bytes() == (tiny_bundle / "onnx/model.onnx").read_bytes()


def test_a_folder_has_no_revisions(tiny_checkpoint: Path) -> None:
    assert fetch_checkpoint(str(tiny_checkpoint)).revision is None
    with pytest.raises(CheckpointError, match="is a folder and has no revisions; leave out --revision v1"):
        fetch_checkpoint(str(tiny_checkpoint), "v1")


@pytest.mark.parametrize(
    "name",
    ["m3e-base", "/no/such/folder", "./folder/name", "a/b/c", "org/", "org/name\n", "组/名", "modelscope:m3e-base"],
)
def test_neither_folder_nor_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="is neither a folder here nor a hub id"):
        fetch_checkpoint(name)


@pytest.mark.parametrize(
    ("package", "hub_id", "extra"),
    [("huggingface_hub", REPO, "export"), ("modelscope_hub", f"modelscope:{REPO}", "export,modelscope")],
)
def test_an_id_without_its_client_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, hub_id: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=rf'pip install "m3e-runtime\[{extra}\]"'):
        fetch_checkpoint(hub_id)
