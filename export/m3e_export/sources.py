"""A folder or a hub id -> a local folder that holds the checkpoint.

Folders are only read, and may hold symlinks into a folder ``blobs`` beside them, as the hubs' own caches do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

from m3e.errors import CheckpointError, DependencyError

# What a checkpoint in sentence-transformers layout consists of; other frameworks' weights stay on the hub.
_PATTERNS = [
    "*.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "model*.safetensors",
    "*/config.json",
    "*/model.safetensors",
]
# Read only where there is no safetensors file; a Dense module may be pickled when the encoder is not.
_PICKLED = ["pytorch_model*.bin", "*/pytorch_model.bin"]
MODELSCOPE = "modelscope:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """A checkpoint's folder, what the user called it, and the hub's commit if it came from there."""

    folder: Path
    id: str
    revision: str | None


def fetch_checkpoint(checkpoint: str, revision: str | None = None) -> LocalCheckpoint:
    """Find a checkpoint on disk, or download it with huggingface-hub or modelscope-hub.

    ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` work as huggingface-hub documents them,
    ``MODELSCOPE_ENDPOINT``, ``MODELSCOPE_CACHE`` and ``MODELSCOPE_API_TOKEN`` as modelscope-hub does. Offline, by
    ``HF_HUB_OFFLINE=1``, neither is asked: a checkpoint that was downloaded before is found in its hub's cache.

    Args:
        checkpoint: A folder, or a hub id such as ``moka-ai/m3e-base`` or ``modelscope:Jerry0/m3e-base``.
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: No such folder, one with links out of it, not on the hub, or the hub cannot be reached.
        DependencyError: A hub id without huggingface-hub installed.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{checkpoint!r} is a folder and has no revisions; leave out --revision {revision}")
        _check_links(folder)
        return LocalCheckpoint(folder, folder.resolve().name, None)
    hub_id = checkpoint.removeprefix(MODELSCOPE)
    if not _HUB_ID.fullmatch(hub_id):
        raise CheckpointError(
            f"{checkpoint!r} is neither a folder here nor a hub id; expected a path, ORGANISATION/MODEL, or "
            f"{MODELSCOPE}ORGANISATION/MODEL"
        )
    if checkpoint != hub_id:
        return _download_from_modelscope(hub_id, revision)
    return _download(checkpoint, revision)


def _check_links(folder: Path) -> None:
    """Refuse links to files that are not the checkpoint's: what they hold would be copied into the bundle."""
    own = folder.resolve()
    roots = (own, own.parent / "blobs", own.parent.parent / "blobs")
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
            raise CheckpointError(
                f"{str(path)!r} is a link to {str(path.resolve())!r}, outside of the checkpoint; "
                "put the file itself there"
            )


def _download(repo_id: str, revision: str | None) -> LocalCheckpoint:
    try:
        import huggingface_hub
    except ImportError as error:
        raise DependencyError(
            f"reading {repo_id!r} from the hub needs huggingface-hub: pip install \"m3e-runtime[export]\""
        ) from error  # fmt: skip
    try:
        folder = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS))
        if not any(folder.glob("model*.safetensors")):
            # moka-ai/m3e-small has no safetensors; only then are the pickled weights worth their bytes. By its commit:
            # a branch may have moved since, and the file would come to lie beside another folder.
            huggingface_hub.snapshot_download(repo_id, revision=folder.name, allow_patterns=_PICKLED)
            if not any(folder.glob("pytorch_model*.bin")):
                raise FileNotFoundError("it has neither model.safetensors nor pytorch_model.bin")
    except Exception as error:  # the hub client raises its own, the HTTP client's and the system's errors
        wanted = f"{repo_id}@{revision}" if revision else repo_id
        raise CheckpointError(
            f"cannot read {wanted!r} from the hub ({type(error).__name__}: {error}). Check the id, the network or "
            "HF_ENDPOINT; with HF_HUB_OFFLINE=1 the checkpoint must be in the cache; or pass a local folder"
        ) from error
    return LocalCheckpoint(folder, repo_id, folder.name)


def _download_from_modelscope(repo_id: str, revision: str | None) -> LocalCheckpoint:
    """ModelScope names no commit for a branch: the revision is the branch and a hash of what it held."""
    try:
        import modelscope_hub
        from huggingface_hub.constants import HF_HUB_OFFLINE
    except ImportError as error:
        raise DependencyError(
            f"reading {repo_id!r} from ModelScope needs {error.name}: pip install \"m3e-runtime[export,modelscope]\""
        ) from error  # fmt: skip
    revision = revision or "master"
    hub = modelscope_hub.HubApi()

    def download(patterns: list[str]) -> Path:
        return Path(
            hub.download_repo(
                repo_id, "model", revision=revision, allow_patterns=patterns, local_files_only=HF_HUB_OFFLINE
            )
        )

    try:
        folder = download(_PATTERNS)
        if not any(folder.glob("model*.safetensors")):
            folder = download(_PICKLED)
            if not any(folder.glob("pytorch_model*.bin")):
                raise FileNotFoundError("it has neither model.safetensors nor pytorch_model.bin")
    except Exception as error:  # the hub client's, the HTTP client's and the system's errors
        raise CheckpointError(
            f"cannot read '{repo_id}@{revision}' from ModelScope ({type(error).__name__}: {error}). Check the id, the "
            "network or MODELSCOPE_ENDPOINT; with HF_HUB_OFFLINE=1 the checkpoint must be in the cache; or pass a "
            "local folder"
        ) from error
    return LocalCheckpoint(folder, f"{MODELSCOPE}{repo_id}", f"{revision}-{_digest(folder)[:12]}")


def _digest(folder: Path) -> str:
    """Hash the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder).as_posix()} ".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
