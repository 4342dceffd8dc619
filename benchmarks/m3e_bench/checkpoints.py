"""Checkpoints with random weights, in the layout that sentence-transformers writes.

Random weights are right for equality and for speed; they say nothing about accuracy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

# Layers, hidden size, heads, intermediate size.
SHAPES = {
    "tiny": (2, 64, 4, 128),
    "small": (4, 512, 8, 2048),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}


def vocabulary() -> list[str]:
    """21128 WordPiece entries, as many as M3E has: special tokens, printable ASCII, suffixes, CJK ideographs."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]"]
    tokens += [chr(code) for code in range(33, 127)]
    tokens += [f"##{character}" for character in "abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens += [chr(code) for code in range(0x4E00, 0xA000)]
    return tokens


def random_tensors(shape: str, seed: int = 0, vocab_size: int = 21128) -> dict[str, np.ndarray[Any, Any]]:
    """Weights of a BERT, drawn as BERT's own initialisation draws them, with norms that are not trivial."""
    layers, hidden, _, inner = SHAPES[shape]
    rng = np.random.default_rng(seed)

    def normal(*size: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)

    tensors = {
        "embeddings.word_embeddings.weight": normal(vocab_size, hidden),
        "embeddings.position_embeddings.weight": normal(512, hidden),
        "embeddings.token_type_embeddings.weight": normal(2, hidden),
    }
    linears = {
        "attention.self.query": (hidden, hidden),
        "attention.self.key": (hidden, hidden),
        "attention.self.value": (hidden, hidden),
        "attention.output.dense": (hidden, hidden),
        "intermediate.dense": (inner, hidden),
        "output.dense": (hidden, inner),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(layers):
        for name, size in linears.items():
            tensors[f"encoder.layer.{i}.{name}.weight"] = normal(*size)
            tensors[f"encoder.layer.{i}.{name}.bias"] = normal(size[0])
        norms += [f"encoder.layer.{i}.attention.output.LayerNorm", f"encoder.layer.{i}.output.LayerNorm"]
    for name in norms:
        tensors[f"{name}.weight"] = 1 + normal(hidden)
        tensors[f"{name}.bias"] = normal(hidden)
    return tensors


def write_checkpoint(folder: Path, shape: str = "tiny", *, seed: int = 0, normalize: bool = False) -> Path:
    """Write a checkpoint with mean pooling and return its folder."""
    layers, hidden, heads, inner = SHAPES[shape]
    folder.mkdir(parents=True)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": 21128,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    }
    write_json(folder / "config.json", config)
    safetensors.numpy.save_file(random_tensors(shape, seed), folder / "model.safetensors", {"format": "pt"})
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512},
    )
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalize
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True}
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    return folder


def write_json(path: Path, content: object) -> None:
    """Write JSON, making the parent folder if it is missing."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
