"""BERT weights -> a graph for CUDA: FP16, and no token of padding anywhere but in attention's offsets.

The runtime lays the real tokens of a batch end to end, so every kernel sees (T, hidden) and the graph never asks the
GPU for a shape: nothing waits, and the whole can be captured. Seven kernels a layer, of onnxruntime's own:
PackedMultiHeadAttention reads Q, K and V as the linear layers leave them (their biases are folded away, but for the
query's), SkipLayerNormalization and BiasGelu take up the biases of the linear layers before them.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx

from m3e_export.builder import CONTRIB
from m3e_export.checkpoint import GELU_APPROXIMATION, Checkpoint
from m3e_export.fp16 import EMBEDDINGS, FLOAT, INT32, HalfBuilder, Value, fold_biases
from m3e_export.graph_tensorrt import divide_by_lengths, unit, unsupported_pooling


def build_cuda_graph(checkpoint: Checkpoint, fp32_sites: Collection[str] = ()) -> onnx.ModelProto:
    """Build the packed graph.

    Args:
        checkpoint: Weights, config and pooling.
        fp32_sites: Sites that stay FP32.

    Returns:
        A model with inputs ``input_ids`` and ``position_ids``, int32 (T,), ``token_offset``, int32 (batch, seq_len),
        and ``cumulative_sequence_length``, int32 (batch + 1,), the latter two as PackedMultiHeadAttention defines
        them; and output ``sentence_embedding``, float32 (batch, dim).
    """
    checkpoint = fold_biases(checkpoint)
    config, tensors = checkpoint.config, checkpoint.tensors
    b = HalfBuilder(
        {
            "input_ids": (INT32, ["token_count"]),
            "position_ids": (INT32, ["token_count"]),
            "token_offset": (INT32, ["batch", "seq_len"]),
            "cumulative_sequence_length": (INT32, ["batch_and_one"]),
        },
        fp32_sites,
    )
    b.scope(EMBEDDINGS)
    dtype = b.dtype(EMBEDDINGS)
    # Sentence encoders see one segment: its row is added to every position.
    rows = tensors["embeddings.position_embeddings.weight"] + tensors["embeddings.token_type_embeddings.weight"][0]
    tables = {
        "embeddings.word_embeddings.weight": (tensors["embeddings.word_embeddings.weight"], "input_ids"),
        "embeddings.position_embeddings.weight": (rows[: checkpoint.max_seq_length], "position_ids"),
    }
    words, positions = (
        b.op("Gather", b.weight(name, table, dtype), index) for name, (table, index) in tables.items()
    )  # fmt: skip
    hidden = _skip_norm(b, checkpoint, f"{EMBEDDINGS}.LayerNorm", words, Value(positions, dtype), dtype)
    for i in range(config.num_hidden_layers):
        hidden = _layer(b, checkpoint, i, hidden)
    b.scope("pooling")
    return b.finish({"sentence_embedding": (_pool(b, checkpoint, hidden), ["batch", config.hidden_size])})


def _layer(b: HalfBuilder, checkpoint: Checkpoint, i: int, hidden: Value) -> Value:
    """One encoder layer, post-norm: (T, hidden) -> (T, hidden)."""
    b.scope(f"layer_{i}")
    layer, tensors = f"encoder.layer.{i}", checkpoint.tensors

    def product(site: str, name: str, value: Value) -> str:
        dtype, full = b.dtype(site), f"{site}.{name}.weight"
        return b.op("MatMul", b.cast(value, dtype), b.weight(full, tensors[full].T, dtype))

    def block(site: str, value: Value, residual: Value) -> Value:
        bias = tensors[f"{site}.dense.bias"]
        return _skip_norm(b, checkpoint, f"{site}.LayerNorm", product(site, "dense", value), residual, b.dtype(site),
                          b.weight(f"{site}.dense.bias", bias, b.dtype(site)))  # fmt: skip

    site = f"{layer}.attention.self"
    dtype = b.dtype(site)
    query = b.op(
        "Gemm",
        b.cast(hidden, dtype),
        b.weight(f"{site}.query.weight", tensors[f"{site}.query.weight"].T, dtype),
        b.weight(f"{site}.query.bias", tensors[f"{site}.query.bias"], dtype),
    )
    context = b.op(
        "PackedMultiHeadAttention", query, product(site, "key", hidden), product(site, "value", hidden), "",
        "token_offset", "cumulative_sequence_length",
        domain=CONTRIB, num_heads=checkpoint.config.num_attention_heads,
    )  # fmt: skip
    hidden = block(f"{layer}.attention.output", Value(context, dtype), hidden)
    site = f"{layer}.intermediate"
    gelu = {"none": "BiasGelu", "tanh": "FastGelu"}[GELU_APPROXIMATION[checkpoint.config.hidden_act]]
    bias = b.weight(f"{site}.dense.bias", tensors[f"{site}.dense.bias"], b.dtype(site))
    inner = b.op(gelu, product(site, "dense", hidden), bias, domain=CONTRIB)
    return block(f"{layer}.output", Value(inner, b.dtype(site)), hidden)


def _skip_norm(
    b: HalfBuilder, checkpoint: Checkpoint, name: str, value: str, residual: Value, dtype: int, bias: str = ""
) -> Value:
    """Normalise value + residual + bias; statistics are FP32 by ``enable_skip_layer_norm_strict_mode``."""
    scale, shift = (b.weight(f"{name}.{part}", checkpoint.tensors[f"{name}.{part}"], dtype)
                    for part in ("weight", "bias"))  # fmt: skip
    inputs = [value, b.cast(residual, dtype), scale, shift, *([bias] if bias else [])]
    out = b.op("SkipLayerNormalization", *inputs, domain=CONTRIB, epsilon=checkpoint.config.layer_norm_eps)
    return Value(out, dtype)


def _pool(b: HalfBuilder, checkpoint: Checkpoint, hidden: Value) -> str:
    """(T, hidden) -> float32 (batch, dim)."""
    (pooling,) = checkpoint.pooling
    ends = "cumulative_sequence_length"
    first, last = b.int64(0), b.int64(np.iinfo(np.int64).max)
    starts = b.op("Slice", ends, first, b.int64(-1))
    if pooling == "cls":
        embedding = b.cast(Value(b.op("Gather", hidden.name, starts), hidden.dtype), FLOAT)
    elif pooling == "mean":
        lengths = b.op("Sub", b.op("Slice", ends, b.int64(1), last), starts)
        cells = b.op("RestorePadding", hidden.name, "token_offset", domain=CONTRIB)  # zeros at pads
        total = b.op("ReduceSum", b.cast(Value(cells, hidden.dtype), FLOAT), b.int64(1), keepdims=0)
        embedding = divide_by_lengths(b, total, lengths)
    else:
        raise unsupported_pooling(pooling)
    return unit(b, embedding) if checkpoint.normalize else embedding
