"""BERT weights -> ONNX graph, packed: no arithmetic on padding.

Everything but attention works on the T real tokens of a batch, laid end to end as (T, hidden). Around attention
the tokens are gathered into the padded rectangle (batch, seq_len, hidden) and back. Where a row has pads, the
gather repeats a real token; the mask keeps it out of attention and of pooling.

Choices that measurements on CPUs made: Add + LayerNormalization rather than
SkipLayerNormalization, Gemm with bias + Gelu rather than BiasGelu, MultiHeadAttention on unpacked Q, K and V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from m3e_export.builder import CONTRIB, GraphBuilder
from m3e_export.checkpoint import GELU_APPROXIMATION, Checkpoint


class Weights:
    """FP32 storage of the word embeddings and the linear layers; a subclass stores them otherwise.

    Args:
        checkpoint: The weights.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors = checkpoint.tensors

    def words(self, builder: GraphBuilder, ids: str) -> str:
        """Word embeddings of ids (T,): float32 (T, hidden)."""
        name = "embeddings.word_embeddings.weight"
        return builder.op("Gather", builder.const(name, self.tensors[name]), ids)

    def linears(self, builder: GraphBuilder, site: str, names: Sequence[str], value: str) -> list[str]:
        """Linear layers that read the same value (T, in): float32 (T, out) each."""
        return [self.linear(builder, f"{site}.{name}", value) for name in names]

    def linear(self, builder: GraphBuilder, name: str, value: str) -> str:
        """One FP32 linear layer."""
        weight = builder.const(f"{name}.weight", self.tensors[f"{name}.weight"].T)  # (in, out)
        return builder.op("Gemm", value, weight, builder.const(f"{name}.bias", self.tensors[f"{name}.bias"]))


@dataclass(frozen=True, slots=True)
class Packing:
    """Values that relate the packed tokens to the padded rectangle.

    Attributes:
        token_index: int64 (T,), position of each real token in the flattened rectangle.
        cell_index: int64 (batch, seq_len), the packed token that stands in each cell of the rectangle.
        mask: int32 (batch, seq_len), 1 for real tokens.
    """

    token_index: str
    cell_index: str
    mask: str


def build_graph(
    checkpoint: Checkpoint, weights: Weights | None = None, *, with_token_embeddings: bool = False
) -> onnx.ModelProto:
    """Build the graph of a checkpoint.

    Args:
        checkpoint: Weights, config and pooling.
        weights: How the word embeddings and linear layers are stored; None for FP32.
        with_token_embeddings: Also output ``last_hidden_state`` (batch, seq_len, hidden), zero at pads.

    Returns:
        A model with inputs ``input_ids``, ``attention_mask``, int64 (batch, seq_len), and output
        ``sentence_embedding``, float32 (batch, dim).
    """
    config = checkpoint.config
    weights = weights or Weights(checkpoint)
    rectangle: tuple[int, list[int | str]] = (onnx.TensorProto.INT64, ["batch", "seq_len"])
    builder = GraphBuilder({"input_ids": rectangle, "attention_mask": rectangle})
    packing, ids, positions = _pack(builder)
    hidden = _embeddings(builder, checkpoint, weights, ids, positions)
    for i in range(config.num_hidden_layers):
        hidden = _layer(builder, checkpoint, weights, i, hidden, packing)
    builder.scope("pooling")
    outputs: dict[str, tuple[str, list[int | str]]] = {
        "sentence_embedding": (_pool(builder, checkpoint, hidden, packing), ["batch", config.hidden_size])
    }
    if with_token_embeddings:
        cells = _masked_cells(builder, hidden, packing)
        outputs["last_hidden_state"] = (cells, ["batch", "seq_len", config.hidden_size])
    return builder.finish(outputs)


def _pack(builder: GraphBuilder) -> tuple[Packing, str, str]:
    """Find the real tokens: their places, ids (T,) and positions (T,)."""
    builder.scope("packing")
    shape = builder.op("Shape", "attention_mask")
    mask = builder.op("Reshape", "attention_mask", builder.int64(-1))
    token_index = builder.op("Reshape", builder.op("NonZero", mask), builder.int64(-1))
    ids = builder.op("Gather", builder.op("Reshape", "input_ids", builder.int64(-1)), token_index)
    positions = builder.op("Mod", token_index, builder.op("Gather", shape, builder.const("one", 1, np.int64)))
    # A running count of real tokens, less one, is the packed place of the last real token up to each cell. Before the
    # first one it is -1, which Gather reads as the last token of all: any token will do.
    count = builder.op("CumSum", mask, builder.const("zero", 0, np.int64))
    cell_index = builder.op("Reshape", builder.op("Sub", count, builder.const("one", 1, np.int64)), shape)
    mask32 = builder.op("Cast", "attention_mask", to=onnx.TensorProto.INT32)
    return Packing(token_index, cell_index, mask32), ids, positions


def _embeddings(builder: GraphBuilder, checkpoint: Checkpoint, weights: Weights, ids: str, positions: str) -> str:
    """Word + position + token type 0, normalised: (T, hidden)."""
    builder.scope("embeddings")
    tensors = checkpoint.tensors
    # Sentence encoders see one segment: its row is added to every position.
    position_rows = (
        tensors["embeddings.position_embeddings.weight"] + tensors["embeddings.token_type_embeddings.weight"][0]
    )
    rows = builder.const("embeddings.position_embeddings.weight", position_rows[: checkpoint.max_seq_length])
    total = builder.op("Add", weights.words(builder, ids), builder.op("Gather", rows, positions))
    return _layer_norm(builder, checkpoint, "embeddings.LayerNorm", total)


def _layer(
    builder: GraphBuilder, checkpoint: Checkpoint, weights: Weights, i: int, hidden: str, packing: Packing
) -> str:
    """One encoder layer, post-norm: (T, hidden) -> (T, hidden)."""
    builder.scope(f"layer_{i}")
    layer = f"encoder.layer.{i}"
    query, key, value = weights.linears(builder, f"{layer}.attention.self", ("query", "key", "value"), hidden)
    context = _attention(builder, checkpoint, query, key, value, packing)
    (attended,) = weights.linears(builder, f"{layer}.attention.output", ("dense",), context)
    hidden = _layer_norm(
        builder, checkpoint, f"{layer}.attention.output.LayerNorm", builder.op("Add", attended, hidden)
    )
    (inner,) = weights.linears(builder, f"{layer}.intermediate", ("dense",), hidden)
    inner = builder.op("Gelu", inner, approximate=GELU_APPROXIMATION[checkpoint.config.hidden_act])
    (outer,) = weights.linears(builder, f"{layer}.output", ("dense",), inner)
    return _layer_norm(builder, checkpoint, f"{layer}.output.LayerNorm", builder.op("Add", outer, hidden))


def _attention(
    builder: GraphBuilder, checkpoint: Checkpoint, query: str, key: str, value: str, packing: Packing
) -> str:
    """Self-attention within each text: three times (T, hidden) -> (T, hidden)."""
    cells = [builder.op("Gather", part, packing.cell_index) for part in (query, key, value)]
    context = builder.op(
        "MultiHeadAttention", *cells, "", packing.mask,
        domain=CONTRIB, num_heads=checkpoint.config.num_attention_heads,
    )  # fmt: skip
    flat = builder.op("Reshape", context, builder.int64(-1, checkpoint.config.hidden_size))
    return builder.op("Gather", flat, packing.token_index)


def _layer_norm(builder: GraphBuilder, checkpoint: Checkpoint, name: str, value: str) -> str:
    weight, bias = (
        builder.const(f"{name}.{part}", checkpoint.tensors[f"{name}.{part}"]) for part in ("weight", "bias")
    )
    return builder.op("LayerNormalization", value, weight, bias, axis=-1, epsilon=checkpoint.config.layer_norm_eps)


def _pool(builder: GraphBuilder, checkpoint: Checkpoint, hidden: str, packing: Packing) -> str:
    """(T, hidden) -> (batch, dim), in FP32, at unit length if the checkpoint says so."""
    (pooling,) = checkpoint.pooling
    embedding = {"mean": _mean, "cls": _cls}[pooling](builder, hidden, packing)
    if not checkpoint.normalize:
        return embedding
    norm = builder.op("ReduceL2", embedding, builder.int64(1), keepdims=1)
    # The bound is torch.nn.functional.normalize's.
    return builder.op("Div", embedding, builder.op("Max", norm, builder.const("norm_bound", 1e-12, np.float32)))


def _mean(builder: GraphBuilder, hidden: str, packing: Packing) -> str:
    """Mean over the real tokens; a text without any gives zeros (sentence-transformers: modules/pooling.py).

    The sum is a product with the mask, text by text: onnxruntime's ReduceSum adds in another order for one text than
    for many.
    """
    cells = builder.op("Gather", hidden, packing.cell_index)
    mask = builder.op("Unsqueeze", builder.op("Cast", packing.mask, to=onnx.TensorProto.FLOAT), builder.int64(1))
    total = builder.op("Squeeze", builder.op("MatMul", mask, cells), builder.int64(1))
    length = builder.op("Cast", builder.op("ReduceSum", "attention_mask", builder.int64(1), keepdims=1),
                        to=onnx.TensorProto.FLOAT)  # fmt: skip
    return builder.op("Div", total, builder.op("Max", length, builder.const("one_float", 1, np.float32)))


def _cls(builder: GraphBuilder, hidden: str, packing: Packing) -> str:
    """The first token of each text."""
    first = builder.op("Gather", packing.cell_index, builder.const("zero", 0, np.int64), axis=1)
    return builder.op("Gather", hidden, first)


def _masked_cells(builder: GraphBuilder, hidden: str, packing: Packing) -> str:
    """(T, hidden) -> (batch, seq_len, hidden), zero at pads."""
    cells = builder.op("Gather", hidden, packing.cell_index)
    mask = builder.op("Cast", packing.mask, to=onnx.TensorProto.FLOAT)
    return builder.op("Mul", cells, builder.op("Unsqueeze", mask, builder.int64(2)))
