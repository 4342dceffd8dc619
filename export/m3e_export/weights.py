"""Weight files -> named float32 arrays."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.errors import CheckpointError, DependencyError

Float32Array = npt.NDArray[np.float32]

# Heads that the encoder does not use: pooler, masked language model, next sentence; and a buffer of positions.
_UNUSED = ("pooler.", "cls.", "embeddings.position_ids", "lm_head.", "classifier.")
# Names in checkpoints that came from TensorFlow.
_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def read_weights(folder: Path) -> tuple[Mapping[str, Float32Array], str]:
    """Read a checkpoint's tensors, ``model.safetensors`` before ``pytorch_model.bin``.

    Args:
        folder: The folder with the weight file.

    Returns:
        Tensors by BERT's own names, without the ``bert.`` prefix and without heads; and the file's sha256.

    Raises:
        CheckpointError: No weight file, or one that cannot be read.
        DependencyError: ``pytorch_model.bin`` without torch.
    """
    safetensors, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safetensors.exists():
        path, tensors = safetensors, _read_safetensors(safetensors)
    elif pickled.exists():
        path, tensors = pickled, _read_pickled(pickled)
    else:
        raise CheckpointError(
            f"{str(folder)!r} has no weights: expected model.safetensors or pytorch_model.bin, found "
            f"{', '.join(sorted(entry.name for entry in folder.iterdir())) or 'nothing'}"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _normalise_names(tensors), digest


def _read_safetensors(path: Path) -> dict[str, Float32Array]:
    import safetensors

    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401 (gives numpy the bfloat16 that safetensors asks it for; onnx brings it)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # safetensors raises its own error, OSError and TypeError
        raise CheckpointError(f"{str(path)!r} cannot be read as safetensors: {error}") from error


def _read_pickled(path: Path) -> dict[str, Float32Array]:
    try:
        import torch
    except ImportError as error:
        raise DependencyError(
            f"{str(path)!r} is a PyTorch file and reading it needs torch: pip install \"m3e-runtime[torch]\""
        ) from error  # fmt: skip
    try:
        # weights_only refuses every pickle that is more than tensors.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in state.items()}
    except Exception as error:  # torch raises pickle, runtime and system errors
        raise CheckpointError(f"{str(path)!r} cannot be read as a PyTorch state dict: {error}") from error


def _normalise_names(tensors: Mapping[str, Float32Array]) -> Mapping[str, Float32Array]:
    normalised = {}
    for original, tensor in tensors.items():
        name = original.removeprefix("bert.")
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        if not name.startswith(_UNUSED):
            normalised[name] = np.ascontiguousarray(tensor, dtype=np.float32)
    return normalised
