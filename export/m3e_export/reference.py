"""What the vectors should be: PyTorch where it is installed, otherwise BERT in float64 numpy.

Both read the checkpoint's tensors by their original names and know nothing of the graph.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e_export.checkpoint import Checkpoint
from m3e_export.encoder_math import attention, gelu, layer_norm

Float64Array = npt.NDArray[np.float64]


def reference_name() -> str:
    """Name the reference that `reference_embeddings` will use, with its version."""
    if _has_torch():
        import torch
        import transformers

        return f"torch {torch.__version__.split('+')[0]} float32, transformers {transformers.__version__}"
    return f"numpy {np.__version__} float64"


def reference_embeddings(checkpoint: Checkpoint, input_ids: Sequence[Sequence[int]]) -> Iterator[Float64Array]:
    """Embed each text by itself, so that nothing can depend on batching or padding.

    Args:
        checkpoint: The model.
        input_ids: Token ids of each text, special tokens included.

    Yields:
        float64 (dim,) for each text, in order.
    """
    if _has_torch():
        token_embeddings = _torch_token_embeddings(checkpoint, input_ids)
    else:
        token_embeddings = (numpy_token_embeddings(checkpoint, ids) for ids in input_ids)
    for tokens in token_embeddings:
        (pooling,) = checkpoint.pooling
        vector = tokens[0] if pooling == "cls" else tokens.mean(axis=0)
        yield vector / max(float(np.linalg.norm(vector)), 1e-12) if checkpoint.normalize else vector


def numpy_token_embeddings(checkpoint: Checkpoint, input_ids: Sequence[int]) -> Float64Array:
    """Run BERT (Devlin et al. 2019, arXiv 1810.04805; transformers' models/bert/modeling_bert.py) on one text.

    Args:
        checkpoint: The model.
        input_ids: Token ids, special tokens included.

    Returns:
        float64 (n_tokens, hidden).
    """
    config = checkpoint.config

    def tensor(name: str) -> Float64Array:
        return checkpoint.tensors[name].astype(np.float64)

    def linear(name: str, x: Float64Array) -> Float64Array:
        y: Float64Array = x @ tensor(f"{name}.weight").T + tensor(f"{name}.bias")
        return y

    def norm(name: str, x: Float64Array) -> Float64Array:
        return layer_norm(x, tensor(f"{name}.weight"), tensor(f"{name}.bias"), config.layer_norm_eps)

    x = checkpoint.tensors["embeddings.word_embeddings.weight"][list(input_ids)].astype(np.float64)
    x += tensor("embeddings.position_embeddings.weight")[: len(input_ids)]
    x += tensor("embeddings.token_type_embeddings.weight")[0]
    x = norm("embeddings.LayerNorm", x)
    for i in range(config.num_hidden_layers):
        name = f"encoder.layer.{i}"
        query, key, value = (linear(f"{name}.attention.self.{part}", x)[None] for part in ("query", "key", "value"))
        context = attention(query, key, value, config.num_attention_heads)[0]
        x = norm(f"{name}.attention.output.LayerNorm", x + linear(f"{name}.attention.output.dense", context))
        inner = gelu(linear(f"{name}.intermediate.dense", x), config.hidden_act)
        x = norm(f"{name}.output.LayerNorm", x + linear(f"{name}.output.dense", inner))
    return x


def _has_torch() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in ("torch", "transformers"))


def _torch_token_embeddings(checkpoint: Checkpoint, input_ids: Sequence[Sequence[int]]) -> Iterator[Float64Array]:
    import torch
    from transformers import AutoModel

    with _quiet_transformers():
        model: Any = AutoModel.from_pretrained(checkpoint.folder, dtype=torch.float32)
    model.train(False)
    with torch.inference_mode():
        for ids in input_ids:
            yield model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0].double().numpy()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its reports of heads that the checkpoint lacks or has for nothing, and its progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
