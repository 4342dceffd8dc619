"""An encoder's weights -> a graph for CUDA: FP16, and no token of padding anywhere but in attention's offsets.

The runtime lays the real tokens of a batch end to end, so every kernel sees (T, hidden) and the graph never asks the
GPU for a shape: nothing waits, and the whole can be captured. A layer is six matrix products and four of onnxruntime's
own kernels: PackedMultiHeadAttention reads Q, K and V as the linear layers leave them (their biases are folded away,
but for the query's), SkipLayerNormalization and BiasGelu take up the biases of the linear layers before them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from m3e_export.architectures import ACTIVATIONS
from m3e_export.builder import CONTRIB
from m3e_export.checkpoint import Checkpoint, position_rows
from m3e_export.fp16 import EMBEDDINGS, INT32, GpuPoolingNodes, HalfBuilder, Value, fold_biases
from m3e_export.pooling_graph import append_function, append_head
from m3e_export.walk import PROJECTIONS, hidden_states

# Activations that have a kernel which adds the bias too.
_WITH_BIAS = {"gelu": "BiasGelu", "gelu_tanh": "FastGelu"}


def build_cuda_graph(checkpoint: Checkpoint, fp32_sites: Collection[str] = ()) -> onnx.ModelProto:
    """Build the packed graph.

    Args:
        checkpoint: The model; its attention knows no relative positions, and its prompts are pooled.
        fp32_sites: Sites that stay FP32.

    Returns:
        A model with inputs ``input_ids`` and ``position_ids``, int32 (T,), ``token_offset``, int32 (batch, seq_len),
        and ``cumulative_sequence_length``, int32 (batch + 1,), the latter two as PackedMultiHeadAttention defines
        them; and output ``sentence_embedding``, float32 (batch, dim).
    """
    checkpoint = fold_biases(checkpoint)
    builder = HalfBuilder(
        {
            "input_ids": (INT32, ["token_count"]),
            "position_ids": (INT32, ["token_count"]),
            "token_offset": (INT32, ["batch", "seq_len"]),
            "cumulative_sequence_length": (INT32, ["batch_and_one"]),
        },
        fp32_sites,
    )
    steps = CudaSteps(builder, checkpoint)
    words = steps.words()
    first, *_, last = hidden_states(steps, checkpoint.config, words)
    builder.scope("pooling")
    pooling = _PackedPooling(builder)
    vectors = pooling.pool(checkpoint.pooling, words.name, first.name, last.name)
    vectors = append_head(builder, checkpoint.head, vectors)
    return builder.finish({"sentence_embedding": (vectors, ["batch", checkpoint.embedding_dim])})


@dataclass(frozen=True, slots=True)
class Pending(Value):
    """A value, and what the next kernel still has to add to it.

    Attributes:
        bias: Of the linear layer that made it; empty for none.
        residual: The other summand; None for none.
    """

    bias: str = ""
    residual: Value | None = None


class CudaSteps:
    """The steps of `walk` as onnxruntime's kernels; values are (T, width).

    Args:
        builder: The graph.
        checkpoint: The model, its biases folded.
    """

    def __init__(self, builder: HalfBuilder, checkpoint: Checkpoint) -> None:
        self._builder, self._checkpoint = builder, checkpoint

    def scope(self, name: str) -> None:
        """Name the nodes that follow."""
        self._builder.scope(name)

    def words(self) -> Pending:
        """Word embeddings."""
        return self._rows("embeddings.word_embeddings.weight", "input_ids")

    def positions(self) -> Pending:
        """What is added to the word embeddings."""
        b, pad = self._builder, self._checkpoint.config.padding_position
        index = "position_ids"
        if pad is not None:
            # Pad tokens in a text have row 0 and are not counted: the count up to each, less that before its text.
            is_pad = b.op("Equal", "input_ids", b.const("pad_token_id", pad, np.int32))
            counted = b.op("Cast", b.op("Not", is_pad), to=INT32)
            ones = b.op("Cast", b.op("Equal", "input_ids", "input_ids"), to=INT32)
            axis = b.const("zero", 0, np.int64)
            start = b.op("Sub", b.op("CumSum", ones, axis, exclusive=1), "position_ids")
            before = b.op("Gather", b.op("CumSum", counted, axis, exclusive=1), start)
            index = b.op("Mul", b.op("Sub", b.op("CumSum", counted, axis), before), counted)
        return self._rows("embeddings.position_embeddings.weight", index)

    def linears(self, site: str, names: Sequence[str], x: Value) -> list[Pending]:
        """Linear layers of one input; their biases are left to the kernels behind them, where these can add one."""
        return [self._linear(site, name, x) for name in names]

    def layer_norm(self, name: str, x: Pending) -> Pending:
        """Normalise a sum; statistics are FP32 by ``enable_skip_layer_norm_strict_mode``."""
        b, tensors = self._builder, self._checkpoint.tensors
        assert x.residual is not None, "the walk normalises sums"
        scale, shift = (b.weight(f"{name}.{part}", tensors[f"{name}.{part}"], x.dtype) for part in ("weight", "bias"))
        inputs = [x.name, b.cast(x.residual, x.dtype), scale, shift, *([x.bias] if x.bias else [])]
        epsilon = self._checkpoint.config.layer_norm_eps
        return Pending(b.op("SkipLayerNormalization", *inputs, domain=CONTRIB, epsilon=epsilon), x.dtype)

    def add(self, a: Pending, b: Pending) -> Pending:
        """Sum, which the normalisation behind it makes."""
        return Pending(a.name, a.dtype, a.bias, b)

    def attention(self, site: str, x: Pending) -> Pending:
        """Attention within each text."""
        query, key, value = self.linears(site, PROJECTIONS, x)
        context = self._builder.op(
            "PackedMultiHeadAttention", query.name, key.name, value.name, "",
            "token_offset", "cumulative_sequence_length",
            domain=CONTRIB, num_heads=self._checkpoint.config.num_attention_heads,
        )  # fmt: skip
        return Pending(context, query.dtype)

    def activation(self, x: Pending) -> Pending:
        """The feed-forward block's activation, and the bias before it."""
        function = ACTIVATIONS[self._checkpoint.config.hidden_act]
        if function in _WITH_BIAS:
            return Pending(self._builder.op(_WITH_BIAS[function], x.name, x.bias, domain=CONTRIB), x.dtype)
        return Pending(append_function(self._builder, function, self._builder.op("Add", x.name, x.bias)), x.dtype)

    def _rows(self, name: str, index: str) -> Pending:
        b, dtype = self._builder, self._builder.dtype(EMBEDDINGS)
        table = position_rows(self._checkpoint) if "position" in name else self._checkpoint.tensors[name]
        return Pending(b.op("Gather", b.weight(name, table, dtype), index), dtype)

    def _linear(self, site: str, name: str, x: Value) -> Pending:
        b, full, tensors = self._builder, f"{site}.{name}", self._checkpoint.tensors
        dtype = b.dtype(site)
        inputs = [b.cast(x, dtype), b.weight(f"{full}.weight", tensors[f"{full}.weight"].T, dtype)]
        if name in ("key", "value"):  # whose biases are zero
            return Pending(b.op("MatMul", *inputs), dtype)
        bias = b.weight(f"{full}.bias", tensors[f"{full}.bias"], dtype)
        if name == "dense":
            return Pending(b.op("MatMul", *inputs), dtype, bias)
        return Pending(b.op("Gemm", *inputs, bias), dtype)


class _PackedPooling(GpuPoolingNodes):
    """Poolings of tokens (T, width)."""

    def __init__(self, builder: HalfBuilder) -> None:
        ends = "cumulative_sequence_length"
        self._starts = builder.op("Slice", ends, builder.int64(0), builder.int64(-1))
        self._ends = builder.op("Slice", ends, builder.int64(1), builder.int64(np.iinfo(np.int64).max))
        super().__init__(builder, "token_offset", builder.op("Sub", self._ends, self._starts))

    def _cls(self, tokens: str) -> str:
        return self._float(self._builder.op("Gather", tokens, self._starts))

    def _lasttoken(self, tokens: str) -> str:
        last = self._builder.op("Sub", self._ends, self._builder.const("one_int32", 1, np.int32))
        return self._float(self._builder.op("Gather", tokens, last))

    def _in_cells(self, tokens: str) -> str:
        if tokens not in self._cells:  # zeros at pads
            restored = self._builder.op("RestorePadding", tokens, "token_offset", domain=CONTRIB)
            self._cells[tokens] = self._float(restored)
        return self._cells[tokens]
