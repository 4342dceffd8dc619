"""Checkpoints of the encoders that `tests.encoders` writes, what is built of them, and what both must agree in."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.checkpoints import write_json
from m3e.session import Session
from m3e.tokenizer import Tokenizer
from m3e_export.calibrate import calibrate
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.fit import Int8Site
from m3e_export.graph import build_graph
from m3e_export.int8 import Int8Steps, quantize_rows
from m3e_export.quantize import calibration_ids
from m3e_export.sources import LocalCheckpoint
from m3e_export.texts import corpus
from tests.encoders import write_encoder, write_modules

Array = np.ndarray[Any, Any]

ARCHITECTURES = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet", "ernie"]
# Poolings, and the modules behind them.
POOLINGS: dict[str, tuple[list[str], str]] = {
    "cls": (["cls"], ""),
    "mean": (["mean"], ""),
    "max": (["max"], ""),
    "mean_sqrt_len_tokens": (["mean_sqrt_len_tokens"], ""),
    "weightedmean": (["weightedmean"], ""),
    "lasttoken": (["lasttoken"], ""),
    "cls+max+mean": (["cls", "max", "mean"], ""),
    "mean, Normalize": (["mean"], "Normalize"),
    "cls, Dense, Normalize": (["cls"], "Dense:Tanh:48 Normalize"),
    "mean+lasttoken, Normalize, Dense, Dense": (
        ["mean", "lasttoken"],
        "Normalize Dense:ReLU:96 Dense:Identity:32:nobias",
    ),
}
UNIEM = ["first_last_mean", "embedding_last_mean"]
TOLERANCE = 2e-6  # largest difference of a component of unit vectors
MEAN_COSINE, MIN_COSINE = 0.9995, 0.999  # of int8

TEXTS = [
    "", "好", "<pad> a <pad><pad> b [PAD]", "今天天气真好，我们去公园散步吧。", "How do I reset my password? " * 3,
    "合同约定的交货日期为3月15日，" * 9, "12,345 people watch on https://example.com/a?b=c " * 40,
    *corpus("zh")[5::300], *corpus("en")[5::350],
]  # fmt: skip


@functools.cache
def encoder_folder(kind: str) -> Path:
    return write_encoder(Path(tempfile.mkdtemp()) / kind, kind)


@functools.lru_cache(maxsize=8)
def hidden_states(folder: Path) -> list[tuple[Array, Array, Array]]:
    """Word embeddings, embeddings and last layer of each text by transformers, each text by itself."""
    model: Any = transformers.AutoModel.from_pretrained(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    states = []
    with torch.inference_mode():
        for text in TEXTS:
            ids = tokenizer(text, truncation=True, max_length=512, return_tensors="pt").input_ids
            found = model(ids, output_hidden_states=True).hidden_states
            words = model.get_input_embeddings()(ids)
            states.append((words[0].numpy(), found[0][0].numpy(), found[-1][0].numpy()))
    return states


def load(kind: str, pooling: list[str], head: str = "", *, include_prompt: bool = True) -> tuple[Path, Checkpoint]:
    """A folder of the kind's encoder with these modules: the weights are the same file for all."""
    folder = Path(tempfile.mkdtemp()) / "checkpoint"
    folder.mkdir()
    for file in encoder_folder(kind).iterdir():
        os.link(file, folder / file.name)
    if pooling[0] in UNIEM:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").unlink()
        write_json(folder / "config.json", config | {"uniem_pooling_strategy": pooling[0]})
    else:
        write_modules(folder, pooling, head, include_prompt=include_prompt)
    return folder, load_checkpoint(LocalCheckpoint(folder, kind, None))


@functools.cache
def sites(kind: str) -> dict[str, Int8Site]:
    _, checkpoint = load(kind, ["mean"])
    levels, scales = quantize_rows(checkpoint.tensors["embeddings.word_embeddings.weight"])
    return calibrate(checkpoint, calibration_ids(checkpoint, None)[:80], levels * scales)[0]


def embedder(kind: str, checkpoint: Checkpoint, precision: str) -> Callable[..., Array]:
    """What `Encoder.encode` does, on a graph that is in no bundle."""
    int8 = functools.partial(Int8Steps, sites=sites(kind), signed=True) if precision == "int8" else None
    model = build_graph(checkpoint, int8).SerializeToString()
    session = Session(model, num_threads=1, mixed=precision == "int8")
    tokenizer = Tokenizer(checkpoint.tokenizer_json, checkpoint.max_seq_length)

    def embed(texts: list[str], prompt_length: int = 0) -> Array:
        tokens = tokenizer(texts)
        vectors = np.empty((len(texts), checkpoint.embedding_dim), np.float32)
        for rows in session.plan(tokens.n_tokens):
            vectors[rows] = session.run([tokens.input_ids[row] for row in rows], prompt_length=prompt_length)
        return vectors

    return embed


def unit(vectors: Array) -> Array:
    rows: Array = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return rows


def agree(vectors: Array, expected: Array, precision: str) -> None:
    """Hold vectors to what docs/checkpoints.md promises of the precision."""
    if precision == "fp32":
        assert np.abs(unit(vectors) - unit(expected)).max() <= TOLERANCE
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-5)
    else:
        cosines = (unit(vectors) * unit(expected)).sum(axis=1)
        assert cosines.mean() >= MEAN_COSINE
        assert cosines.min() >= MIN_COSINE
