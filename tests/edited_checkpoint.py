"""A small checkpoint, and ways to change it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import safetensors.torch

from benchmarks.checkpoints import random_tensors, vocabulary, write_json
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.sources import LocalCheckpoint

WORDS = 300
TENSORS: dict[str, Any] = {**random_tensors("tiny", vocab_size=WORDS)}
QUERY, BIAS = "encoder.layer.1.attention.self.query.weight", "embeddings.LayerNorm.bias"
CONFIG, MODULES, POOLING, PROMPTS, LENGTH, TOKENIZER = FILES = (
    "config.json", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "tokenizer_config.json",
)  # fmt: skip


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A small checkpoint to change; its name does not say M3E."""
    folder = tmp_path / "bert"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("model.safetensors", "vocab.txt"))
    edit(folder, {CONFIG: {"vocab_size": WORDS}})
    (folder / "vocab.txt").write_text("\n".join(vocabulary()[:WORDS]), encoding="utf-8")
    safetensors.numpy.save_file(TENSORS, folder / "model.safetensors")
    return folder


def edit(folder: Path, edits: dict[str, Any]) -> None:
    """Remove a file (None), replace it (list) or set fields in it (dict), where `...` removes a field."""
    for name, change in edits.items():
        path = folder / name
        if isinstance(change, dict):
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            change = {field: value for field, value in (before | change).items() if value is not ...}
        path.unlink() if change is None else write_json(path, change)


def load(folder: Path, **asked: Any) -> Checkpoint:
    return load_checkpoint(LocalCheckpoint(folder, "some-org/bert", None), **asked)


def modules(*kinds: str) -> dict[str, Any]:
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    return {MODULES: [{"path": path, "type": f"x.models.{kind}"} for path, kind in zip(paths, kinds, strict=True)]}


def renamed(old: str, new: str) -> dict[str, Any]:
    return {re.sub(old, new, name): tensor for name, tensor in TENSORS.items()}
