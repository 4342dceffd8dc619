"""A folder or a hub id -> a local folder that holds the checkpoint."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from m3e.errors import CheckpointError, DependencyError

# What a BERT checkpoint in sentence-transformers layout consists of; other frameworks' weights stay on the hub.
_PATTERNS = ["*.json", "vocab.txt", "model.safetensors", "*/config.json"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """A checkpoint's folder, what the user called it, and the hub's commit if it came from there."""

    folder: Path
    id: str
    revision: str | None


def fetch_checkpoint(checkpoint: str, revision: str | None = None) -> LocalCheckpoint:
    """Find a checkpoint on disk, or download it with huggingface-hub.

    ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` work as huggingface-hub documents them.

    Args:
        checkpoint: A folder, or a hub id such as ``moka-ai/m3e-base``.
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: No such folder, not on the hub, or the hub cannot be reached.
        DependencyError: A hub id without huggingface-hub installed.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{checkpoint!r} is a folder and has no revisions; leave out --revision {revision}")
        return LocalCheckpoint(folder, folder.resolve().name, None)
    if not _HUB_ID.fullmatch(checkpoint):
        raise CheckpointError(
            f"{checkpoint!r} is neither a folder here nor a hub id; expected a path, or ORGANISATION/MODEL"
        )
    return _download(checkpoint, revision)


def _download(repo_id: str, revision: str | None) -> LocalCheckpoint:
    try:
        import huggingface_hub
    except ImportError as error:
        raise DependencyError(
            f"reading {repo_id!r} from the hub needs huggingface-hub: pip install \"m3e-runtime[export]\""
        ) from error  # fmt: skip
    try:
        folder = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS))
        if not (folder / "model.safetensors").exists():
            # moka-ai/m3e-small has no safetensors; only then are the pickled weights worth their bytes. By its commit:
            # a branch may have moved since, and the file would come to lie beside another folder.
            huggingface_hub.hf_hub_download(repo_id, "pytorch_model.bin", revision=folder.name)
    except Exception as error:  # the hub client raises its own, the HTTP client's and the system's errors
        wanted = f"{repo_id}@{revision}" if revision else repo_id
        raise CheckpointError(
            f"cannot read {wanted!r} from the hub ({type(error).__name__}: {error}). Check the id, the network or "
            "HF_ENDPOINT; with HF_HUB_OFFLINE=1 the checkpoint must be in the cache; or pass a local folder"
        ) from error
    return LocalCheckpoint(folder, repo_id, folder.name)
