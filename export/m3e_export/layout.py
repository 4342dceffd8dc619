"""The files around the graphs: sentence-transformers' layout, in which other tools find what they look for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import safetensors.numpy

from m3e_export.checkpoint import Checkpoint
from m3e_export.files import read_json
from m3e_export.modules import LEGACY_KEYS, Dense
from m3e_export.tokenizer import complete_config

# Copied as they are.
_COPIED = (
    "config.json",
    "config_sentence_transformers.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def write_layout(checkpoint: Checkpoint, folder: Path) -> None:
    """Write tokenizer, configuration and modules of a checkpoint into a folder."""
    for name in _COPIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    write(folder / "tokenizer.json", checkpoint.tokenizer_json)
    own, special = (
        read_json(checkpoint.folder / name, default={}) for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    tokenizer_config = complete_config(own, special, checkpoint.tokenizer_json, checkpoint.max_seq_length)
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    kinds = ["Transformer", "Pooling", *(type(module).__name__ for module in checkpoint.head)]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": checkpoint.max_seq_length, "do_lower_case": False}
    )
    _write_json(folder / "1_Pooling" / "config.json", _pooling_config(checkpoint))
    for module, path in zip(checkpoint.head, paths[2:], strict=True):
        if isinstance(module, Dense):
            _write_json(folder / path / "config.json", module.to_config())
            write(folder / path / "model.safetensors", safetensors.numpy.save(module.to_tensors()))


def write(path: Path, data: bytes) -> None:
    """Write a file, and the folder that it lies in."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def _pooling_config(checkpoint: Checkpoint) -> dict[str, object]:
    """The older form where it can say it: every sentence-transformers reads it, and other tools read nothing else."""
    width, prompt = checkpoint.config.hidden_size, {"include_prompt": checkpoint.include_prompt}
    flags = {key: name in checkpoint.pooling for key, name in LEGACY_KEYS.items()}
    if checkpoint.pooling == tuple(name for key, name in LEGACY_KEYS.items() if flags[key]):
        return {"word_embedding_dimension": width, **flags, **prompt}
    return {"embedding_dimension": width, "pooling_mode": list(checkpoint.pooling), **prompt}


def _write_json(path: Path, content: object) -> None:
    write(path, (json.dumps(content, indent=2) + "\n").encode())
