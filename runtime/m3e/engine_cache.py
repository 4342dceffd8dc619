"""TensorRT engines on disk: found by what they were built for, and used only if they are what was written.

An engine is code for one graph, card and set of versions. Whoever could swap the file could run code here, so the
folder is the user's alone and every file is hashed before TensorRT reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from m3e.cache import cache_folder
from m3e.errors import StartError

_LIST = "engines.json"
# A build takes minutes; what is this old was left by a process that died.
_ABANDONED_S = 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKey:
    """Everything that an engine depends on.

    Attributes:
        graph_sha256: The ONNX file.
        card: The card's name.
        compute_capability: Such as ``9.0``.
        tensorrt: Version of the library.
        cuda: Version that onnxruntime was built with, and the driver's.
        onnxruntime: Version.
        profiles: The shapes that the engines serve.
    """

    graph_sha256: str
    card: str
    compute_capability: str
    tensorrt: str
    cuda: str
    onnxruntime: str
    profiles: tuple[str, ...]

    def digest(self) -> str:
        """A name for the folder."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


class EngineCache:
    """A private folder with one folder for each key.

    Args:
        root: The folder; None for ``engines`` in `m3e.cache.cache_folder`. It is made if it is missing.

    Raises:
        StartError: It belongs to somebody else, or others may write there.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = cache_folder() / "engines" if root is None else root
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"the engine cache {str(self.root)!r} cannot be made: {error.strerror}") from error
        _check_private(self.root)

    def find(self, key: EngineKey) -> Path | None:
        """Find the engines of a key, every file checked.

        Returns:
            Their folder, or None: there are none, or they were damaged and are removed.

        Warns:
            RuntimeWarning: Engines were damaged.

        Raises:
            StartError: The folder is not private.
        """
        folder = self.root / key.digest()
        if not folder.is_dir() and not folder.is_symlink():
            return None
        _check_private(folder)
        problem = _problem(folder, key)
        if problem is None:
            return folder
        warnings.warn(f"engines in {str(folder)!r} are rebuilt: {problem}", RuntimeWarning, stacklevel=2)
        shutil.rmtree(folder)
        return None

    @contextlib.contextmanager
    def building(self, key: EngineKey) -> Iterator[Path]:
        """Give a folder to build into; when the block ends well it becomes the key's, whole.

        Another process may have been faster: then its engines stay and these are dropped.

        Yields:
            An empty private folder.

        Raises:
            StartError: It cannot be written.
        """
        folder = self.root / f".{key.digest()}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self._remove_leftovers()
            folder.mkdir(mode=0o700)
            yield folder
            content = {"key": dataclasses.asdict(key), "files": _fingerprints(folder)}
            (folder / _LIST).write_text(json.dumps(content, indent=1), encoding="utf-8")
            try:
                folder.rename(self.root / key.digest())
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # then the other's folder is in place
                    raise
        except OSError as error:
            raise StartError(f"the engine cache {str(self.root)!r} cannot be written: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """Remove what builders left that were killed, hundreds of megabytes each."""
        for path in self.root.glob(".*.tmp-*"):
            with contextlib.suppress(OSError):  # another process may be as quick
                if time.time() - path.lstat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(path)


def _check_private(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise StartError(f"the engine cache {str(folder)!r} is no folder of its own; remove it or choose another")
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        raise StartError(f"the engine cache {str(folder)!r} belongs to user {status.st_uid}; choose another")
    if os.name == "posix" and status.st_mode & 0o077:
        raise StartError(
            f"the engine cache {str(folder)!r} is open to others (mode {stat.S_IMODE(status.st_mode):o}); "
            f"look who wrote there, then: rm -r {folder}"
        )


def _problem(folder: Path, key: EngineKey) -> str | None:
    try:
        content = json.loads((folder / _LIST).read_bytes())
        listed, written_for = content["files"], content["key"]
        found = _fingerprints(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_LIST} cannot be read ({error!r})"
    if written_for != json.loads(json.dumps(dataclasses.asdict(key))):
        return "they were built for something else"
    if not found:
        return "there are none"
    differing = sorted(name for name in {*listed, *found} if listed.get(name) != found.get(name))
    return f"{', '.join(differing)} changed since they were built" if differing else None


def _fingerprints(folder: Path) -> dict[str, str]:
    """Hash every file but the list itself.

    Raises:
        OSError: A link, a pipe, or what else is no plain file.
    """
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(f"{name} is no plain file")
        if name != _LIST:
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
