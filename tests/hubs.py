"""Stand-ins of model hubs on this machine; the hubs' clients are the real ones."""

from __future__ import annotations

import contextlib
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
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import safetensors.torch
import torch

Server = TypeVar("Server", bound=ThreadingHTTPServer)
REPO, PICKLED = "some-org/m3e-tiny", "some-org/m3e-pickled"
MAIN, OLDER, NEWER = "a" * 40, "b" * 40, "c" * 40
# What a checkpoint's repository holds beside it and a conversion has no use for.
UNUSED = ("README.md", "tf_model.h5", "onnx/model.onnx", "eval/results.csv", "modeling.py")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


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
        if not match:  # the client asks for more than models
            return self._send(404, b"{}", {})
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


def fill(server: Hub, tiny_checkpoint: Path) -> None:
    """The tiny checkpoint, and another one that has pickled weights only, as moka-ai/m3e-small."""
    files = {name: (tiny_checkpoint / name).read_bytes() for name in names(tiny_checkpoint)}
    layout = {name: data for name, data in files.items() if name != "model.safetensors"}
    pickled = io.BytesIO()
    torch.save(safetensors.torch.load(files["model.safetensors"]), pickled)
    weights, extra = {"pytorch_model.bin": pickled.getvalue()}, dict.fromkeys(UNUSED, b"x" * 1000)
    server.files = {
        (REPO, MAIN): files | weights | extra,
        (REPO, OLDER): files,
        (PICKLED, MAIN): layout | weights | extra,
        (PICKLED, NEWER): {"README.md": b"moved"},
    }
    server.refs = {(REPO, "main"): MAIN, (REPO, "v1"): OLDER, (PICKLED, "main"): NEWER, (PICKLED, "v1"): MAIN}


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class ModelScope(ThreadingHTTPServer):
    """What modelscope-hub asks ModelScope for: the list of a repository's files, and a file (its _legacy_api.py)."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), ModelScopeAnswer)
        self.files = files
        self.downloads: list[str] = []


class ModelScopeAnswer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelScope

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        root = f"/api/v1/models/{REPO}"
        if query.get("Revision") not in ("master", "v1") or url.path not in (f"{root}/repo/files", f"{root}/repo"):
            return self._send(404, {"Code": 10010205001, "Message": "record not found", "Success": False})
        if url.path == f"{root}/repo/files":
            assert query["Recursive"] == "True"
            files = [
                {"Name": Path(name).name, "Path": name, "Type": "blob", "Size": len(data),
                 "Sha256": hashlib.sha256(data).hexdigest(), "Revision": MAIN}
                for name, data in self.server.files.items()
            ]  # fmt: skip
            return self._send(200, {"Code": 200, "Data": {"Files": files}, "Success": True})
        self.server.downloads.append(query["FilePath"])
        return self._send(200, self.server.files[query["FilePath"]])

    do_HEAD = do_GET  # noqa: N815 (http.server's name)

    def _send(self, status: int, body: bytes | dict[str, Any]) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if body is data else "application/json")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
        pass


def run(
    home: Path, server: ThreadingHTTPServer, *command: str, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run Python with hubs and caches of its own; the clients read these variables when they are imported."""
    theirs = ("HF_", "MODELSCOPE_", "XDG_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(theirs) and not k.lower().endswith("_proxy")}
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
        "MODELSCOPE_ENDPOINT": endpoint,
        "MODELSCOPE_CACHE": str(home / "modelscope"),
        "MODELSCOPE_HOME": str(home / "modelscope-home"),
        "XDG_CACHE_HOME": str(home / "xdg"),
    }
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
