"""What a service does around a model that gives token vectors: sort, batches of 32, pad, mean over the real tokens.

As sentence-transformers' ``encode`` does it, for engines that its backends cannot reach.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def encode_padded(
    texts: list[str], tokenizer: Any, forward: Callable[[dict[str, Array]], Array], *, normalize: bool
) -> Array:
    """Embed texts.

    Args:
        texts: Any number.
        tokenizer: A fast tokenizer of transformers.
        forward: ``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 (batch, seq_len), to token vectors,
            float32 (batch, seq_len, hidden).
        normalize: Whether the checkpoint ends in a Normalize module.

    Returns:
        float32 (n, dim).
    """
    order = np.argsort([-len(text) for text in texts], kind="stable")
    rows: list[Array] = []
    for start in range(0, len(texts), 32):
        batch = [texts[i] for i in order[start : start + 32]]
        inputs = dict(tokenizer(batch, padding=True, truncation=True, max_length=512, return_tensors="np"))
        mask = inputs["attention_mask"].astype(np.float32)[:, :, None]
        tokens = forward(inputs)
        vectors = (tokens * mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1e-9)
        rows.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors)
    embeddings = np.concatenate(rows)
    result = np.empty_like(embeddings)
    result[order] = embeddings
    return result


def has_normalize(checkpoint: Path) -> bool:
    """Whether the checkpoint's vectors have unit length; refuses poolings other than the mean."""
    pooling = json.loads((checkpoint / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    if not (pooling.get("pooling_mode_mean_tokens") or "mean" in pooling.get("pooling_mode", [])):
        raise ValueError(f"this peer pools by the mean only; {checkpoint} asks for another pooling")
    modules = json.loads((checkpoint / "modules.json").read_text(encoding="utf-8"))
    return any(module["type"].endswith("Normalize") for module in modules)
