"""Checkpoints from a stand-in of the Hugging Face hub on this machine; huggingface-hub itself is the real one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import safetensors.torch
import torch

from m3e import CheckpointError, DependencyError, Encoder
from m3e_export.sources import fetch_checkpoint

CONVERT = str(Path(__file__).parents[1] / "export" / "convert.py")
REPO, PICKLED = "some-org/m3e-tiny", "some-org/m3e-pickled"
MAIN, OLDER, NEWER = "a" * 40, "b" * 40, "c" * 40
# What a checkpoint's repository holds beside it and a conversion has no use for.
UNUSED = ("README.md", "tf_model.h5", "onnx/model.onnx", "eval/results.csv", "modeling.py")


class Hub(ThreadingHTTPServer):
    """What the client asks a hub for: the commit of a revision, the files of a commit, the bytes of a file."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.refs: dict[tuple[str, str], str] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.downloads: set[tuple[str, str]] = set()
        self.moves: dict[tuple[str, str], str] = {}  # refs that are pushed to once they have been asked for

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", path)
        assert match, path
        repo, kind, revision, file = match.groups()
        commit = revision if (repo, revision) in self.server.files else self.server.refs.get((repo, revision))
        if commit is None:
            known = any(repo == other for other, _ in self.server.files)
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        files = self.server.files[repo, commit]
        if kind == "resolve":
            self.server.downloads.add((repo, file))
            if file not in files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            etag = hashlib.sha256(files[file]).hexdigest()
            return self._send(200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        if kind == "tree":
            entries = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
            return self._send(200, json.dumps(entries).encode(), {})
        if (repo, revision) in self.server.moves:
            self.server.refs[repo, revision] = self.server.moves.pop((repo, revision))
        siblings = [{"rfilename": name} for name in files]
        return self._send(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode(), {})

    do_HEAD = do_GET  # noqa: N815 (http.server's name)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
        pass


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tiny_checkpoint: Path) -> Iterator[Hub]:
    """A hub with the tiny checkpoint, and with another one that has pickled weights only, as moka-ai/m3e-small."""
    files = {name: (tiny_checkpoint / name).read_bytes() for name in names(tiny_checkpoint)}
    layout = {name: data for name, data in files.items() if name != "model.safetensors"}
    pickled = io.BytesIO()
    torch.save(safetensors.torch.load(files["model.safetensors"]), pickled)
    weights, extra = {"pytorch_model.bin": pickled.getvalue()}, dict.fromkeys(UNUSED, b"x" * 1000)
    with Hub() as server:
        server.files = {
            (REPO, MAIN): files | weights | extra,
            (REPO, OLDER): files,
            (PICKLED, MAIN): layout | weights | extra,
            (PICKLED, NEWER): {"README.md": b"moved"},
        }
        server.refs = {(REPO, "main"): MAIN, (REPO, "v1"): OLDER, (PICKLED, "main"): NEWER, (PICKLED, "v1"): MAIN}
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.stop()
        thread.join()


def run(home: Path, hub: Hub, *command: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Python with a hub of its own; huggingface-hub reads these variables when it is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    environment = {
        **kept,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def fetch(home: Path, hub: Hub, repo: str, revision: str | None) -> tuple[Path, str]:
    code = f"import sys; sys.path[:] = {sys.path!r}; from m3e_export.sources import fetch_checkpoint"
    code += f"; found = fetch_checkpoint({repo!r}, {revision!r}); print(found.folder, found.revision)"
    done = run(home, hub, "-c", code)
    assert done.returncode == 0, done.stderr
    folder, found = done.stdout.split()
    return Path(folder), found


@pytest.mark.checkout
def test_an_id_converts_and_converts_again_from_the_cache(hub: Hub, tiny_bundle: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    done = run(tmp_path / "home", hub, CONVERT, REPO, "-o", str(first))
    assert done.returncode == 0, done.stderr
    source = Encoder(first).manifest.source
    assert (source.id, source.revision) == (REPO, MAIN)
    assert (first / "onnx" / "model.onnx").read_bytes() == (tiny_bundle / "onnx" / "model.onnx").read_bytes()
    hub.stop()
    done = run(tmp_path / "home", hub, CONVERT, REPO, "-o", str(again), offline=True)
    assert done.returncode == 0, done.stderr
    assert (again / "manifest.json").read_bytes() == (first / "manifest.json").read_bytes()


@pytest.mark.checkout
def test_pickled_weights_of_a_revision_convert(hub: Hub, tiny_bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    done = run(tmp_path / "home", hub, CONVERT, PICKLED, "--revision", "v1", "-o", str(target))
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


def test_a_folder_has_no_revisions(tiny_checkpoint: Path) -> None:
    assert fetch_checkpoint(str(tiny_checkpoint)).revision is None
    with pytest.raises(CheckpointError, match="is a folder and has no revisions; leave out --revision v1"):
        fetch_checkpoint(str(tiny_checkpoint), "v1")


@pytest.mark.parametrize(
    "name", ["m3e-base", "/no/such/folder", "./folder/name", "a/b/c", "org/", "org/name\n", "组/名"]
)
def test_neither_folder_nor_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="is neither a folder here nor a hub id"):
        fetch_checkpoint(name)


def test_an_id_without_huggingface_hub_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DependencyError, match=r'pip install "m3e-runtime\[export\]"'):
        fetch_checkpoint(REPO)
