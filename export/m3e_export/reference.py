"""What the vectors should be: PyTorch where it is installed, otherwise BERT in float64 numpy.

Both read the checkpoint's tensors by their original names and know nothing of the graph.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from m3e_export.checkpoint import Checkpoint

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

    def layer_norm(name: str, x: Float64Array) -> Float64Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config.layer_norm_eps)
        y: Float64Array = scaled * tensor(f"{name}.weight") + tensor(f"{name}.bias")
        return y

    x = checkpoint.tensors["embeddings.word_embeddings.weight"][list(input_ids)].astype(np.float64)
    x += tensor("embeddings.position_embeddings.weight")[: len(input_ids)]
    x += tensor("embeddings.token_type_embeddings.weight")[0]
    x = layer_norm("embeddings.LayerNorm", x)
    for i in range(config.num_hidden_layers):
        name = f"encoder.layer.{i}"
        query, key, value = (
            linear(f"{name}.attention.self.{part}", x)
            .reshape(len(x), config.num_attention_heads, -1)
            .transpose(1, 0, 2)  # (heads, n_tokens, head_dim)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        context = (weights @ value).transpose(1, 0, 2).reshape(x.shape)
        x = layer_norm(f"{name}.attention.output.LayerNorm", x + linear(f"{name}.attention.output.dense", context))
        inner = gelu(linear(f"{name}.intermediate.dense", x), config.hidden_act)
        x = layer_norm(f"{name}.output.LayerNorm", x + linear(f"{name}.output.dense", inner))
    return x


def gelu(x: Float64Array, hidden_act: str) -> Float64Array:
    """Gaussian error linear unit (Hendrycks and Gimpel 2016, arXiv 1606.08415), exact or by tanh."""
    if hidden_act == "gelu":
        return 0.5 * x * (1 + erf(x / math.sqrt(2)))
    result: Float64Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return result


_ERF_STEP = 1 / 512
_ERF_GRID = np.arange(-6 * 512, 6 * 512 + 1) * _ERF_STEP
_ERF_VALUES = np.array([math.erf(x) for x in _ERF_GRID])
_ERF_SLOPES = 2 / math.sqrt(math.pi) * np.exp(-(_ERF_GRID**2)) * _ERF_STEP


def erf(x: Float64Array) -> Float64Array:
    """Error function; numpy has none, and math.erf takes one number at a time.

    Cubic Hermite interpolation of math.erf on a grid of 1/512: error below h^4 / 384 x max |erf''''| = 4e-13;
    beyond 6 it is 1 to the last bit.
    """
    place = np.clip((x - _ERF_GRID[0]) / _ERF_STEP, 0, len(_ERF_GRID) - 1)
    i = np.minimum(place.astype(np.int64), len(_ERF_GRID) - 2)
    t = place - i
    h00, h10 = (1 + 2 * t) * (1 - t) ** 2, t * (1 - t) ** 2
    h01, h11 = t**2 * (3 - 2 * t), t**2 * (t - 1)
    result: Float64Array = (
        h00 * _ERF_VALUES[i] + h10 * _ERF_SLOPES[i] + h01 * _ERF_VALUES[i + 1] + h11 * _ERF_SLOPES[i + 1]
    )
    return result


def _has_torch() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in ("torch", "transformers"))


def _torch_token_embeddings(checkpoint: Checkpoint, input_ids: Sequence[Sequence[int]]) -> Iterator[Float64Array]:
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(checkpoint.folder)
    config.dtype = torch.float32
    model: torch.nn.Module = BertModel(config, add_pooling_layer=False)
    model.train(False)
    state = {name: torch.from_numpy(np.asarray(tensor)) for name, tensor in checkpoint.tensors.items()}
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        for ids in input_ids:
            yield model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0].double().numpy()
