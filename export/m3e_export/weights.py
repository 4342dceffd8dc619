"""Weight files -> named float32 arrays."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.errors import CheckpointError, DependencyError
from m3e_export.architectures import Architecture

Float32Array = npt.NDArray[np.float32]

# Parts that the encoder's output does not depend on: poolers, heads of pre-training and of other tasks, buffers.
_UNUSED = (
    "pooler.", "cls.", "lm_head.", "classifier.", "pre_classifier.", "qa_outputs.", "predictions.",
    "discriminator_predictions.", "generator_predictions.", "generator_lm_head.",
    "vocab_transform.", "vocab_layer_norm.", "vocab_projector.",
    "embeddings.position_ids", "embeddings.token_type_ids",
)  # fmt: skip
# Names in checkpoints that came from TensorFlow.
_RENAMED = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
_ADAPTERS = (".lora_", "base_model.model.", ".prefix_encoder.", ".adapters.")


def find_weights(folder: Path) -> list[Path]:
    """Find a checkpoint's weight files: safetensors before pickles, one file before several.

    Raises:
        CheckpointError: There are none.
    """
    names = []
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            names = [name]
        elif index.exists():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{str(index)!r} is no index of weight files: {error!r}") from error
            if strange := [name for name in names if name != Path(name).name]:
                raise CheckpointError(f"{str(index)!r} names {strange[0]!r}, expected a file beside it")
        if names:
            break
    if not names:
        raise CheckpointError(
            f"{str(folder)!r} has no weights: expected model.safetensors or pytorch_model.bin, found "
            f"{', '.join(sorted(entry.name for entry in folder.iterdir())) or 'nothing'}"
        )
    return [folder / name for name in names]


def read_tensors(paths: Sequence[Path]) -> dict[str, Float32Array]:
    """Read weight files as they are.

    Raises:
        CheckpointError: A file that cannot be read.
        DependencyError: ``pytorch_model.bin`` without torch.
    """
    tensors: dict[str, Float32Array] = {}
    for path in paths:
        tensors |= _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    return {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}


def read_weights(folder: Path, architecture: Architecture) -> tuple[Mapping[str, Float32Array], str]:
    """Read an encoder's tensors.

    Args:
        folder: The folder with the weight files.
        architecture: What they are called there.

    Returns:
        Tensors by BERT's own names, without prefix and without heads; and the sha256 of the weight file (of several: of
        their digests).

    Raises:
        CheckpointError: No weight file, one that cannot be read, or an adapter's weights.
        DependencyError: ``pytorch_model.bin`` without torch.
    """
    paths = find_weights(folder)
    digests = []
    for path in paths:
        try:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return _normalise_names(read_tensors(paths), architecture, folder), whole


def _read_safetensors(path: Path) -> dict[str, Any]:
    import safetensors

    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401 (gives numpy the bfloat16 that safetensors asks it for; onnx brings it)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # safetensors raises its own error, OSError and TypeError
        raise CheckpointError(f"{str(path)!r} cannot be read as safetensors: {error}") from error


def _read_pickled(path: Path) -> dict[str, Any]:
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


def _normalise_names(
    tensors: Mapping[str, Float32Array], architecture: Architecture, folder: Path
) -> Mapping[str, Float32Array]:
    normalised: dict[str, Float32Array] = {}
    for original, tensor in tensors.items():
        if any(part in f".{original}" for part in _ADAPTERS):
            raise CheckpointError(
                f"the weights in {str(folder)!r} hold an adapter that is not merged ({original}). Merge it into the "
                "model first: with peft, model.merge_and_unload() and then save_pretrained"
            )
        name = original.removeprefix(architecture.prefix)
        for old, new in (*_RENAMED, *architecture.tensor_names):
            name = name.replace(old, new)
        if name.startswith(_UNUSED):
            continue
        if name in normalised:
            raise CheckpointError(f"the weights in {str(folder)!r} hold {name} twice, with and without a prefix")
        normalised[name] = tensor
    return normalised
