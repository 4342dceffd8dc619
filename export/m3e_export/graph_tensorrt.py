"""BERT weights -> a graph of standard operators for TensorRT: the precision of every value stands in the graph.

TensorRT plans each shape ahead, so texts come as a padded rectangle with their lengths, and TensorRT itself fuses what
belongs together. Strongly typed networks take the element types as they are: FP16, with softmax, the statistics of
normalisation, pooling and the output in FP32, and INT8 where Q/DQ pairs stand.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx

from m3e.errors import ExportError
from m3e_export.calibrate import Int8Site
from m3e_export.checkpoint import GELU_APPROXIMATION, Checkpoint
from m3e_export.fp16 import EMBEDDINGS, FLOAT, FLOAT16, INT32, HalfBuilder, Value, fold_biases
from m3e_export.int8 import fold_divisors

# What a pad's score becomes, in FP32: softmax gives it zero and never meets an infinity.
_MASKED = -1e9


def build_tensorrt_graph(
    checkpoint: Checkpoint, fp32_sites: Collection[str] = (), int8_sites: Mapping[str, Int8Site] | None = None
) -> onnx.ModelProto:
    """Build the graph of standard operators.

    Args:
        checkpoint: Weights, config and pooling.
        fp32_sites: Sites that stay FP32.
        int8_sites: What calibration for INT8 made; those that are FP32 sites are left out.

    Returns:
        A model with inputs ``input_ids``, int32 (batch, seq_len), and ``lengths``, int32 (batch,), and output
        ``sentence_embedding``, float32 (batch, dim).
    """
    return build_watched(checkpoint, fp32_sites, int8_sites)[0]


def build_watched(
    checkpoint: Checkpoint, fp32_sites: Collection[str] = (), int8_sites: Mapping[str, Int8Site] | None = None
) -> tuple[onnx.ModelProto, list[tuple[str, str]]]:
    """Build the graph, and name the values that are FP16 where their site is: pairs of site and value."""
    if int8_sites is None:
        checkpoint = fold_biases(checkpoint)  # calibration for INT8 has seen the biases where they are
    config = checkpoint.config
    builder = HalfBuilder(
        {"input_ids": (INT32, ["batch", "seq_len"]), "lengths": (INT32, ["batch"])}, fp32_sites
    )  # fmt: skip
    graph = _Graph(builder, checkpoint, fold_divisors(int8_sites or {}))
    hidden = graph.embeddings()
    for i in range(config.num_hidden_layers):
        hidden = graph.layer(i, hidden)
    builder.scope("pooling")
    model = builder.finish({"sentence_embedding": (graph.pool(hidden), ["batch", config.hidden_size])})
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    return model, builder.watched


class _Graph:
    """The blocks of the graph; each returns a value (batch, seq_len, hidden)."""

    def __init__(self, builder: HalfBuilder, checkpoint: Checkpoint, int8_sites: Mapping[str, Int8Site]) -> None:
        self.builder, self.checkpoint, self.int8_sites = builder, checkpoint, int8_sites
        self.tensors, self.config = checkpoint.tensors, checkpoint.config
        builder.scope("packing")
        shape = builder.op("Shape", "input_ids")
        self.seq_len = builder.op("Slice", shape, builder.int64(1), builder.int64(2))
        count = builder.const("positions", np.arange(checkpoint.max_seq_length), np.int32)
        places = builder.op("Slice", count, builder.int64(0), self.seq_len)
        self.mask = builder.op("Less", places, builder.op("Unsqueeze", "lengths", builder.int64(1)))

    def embeddings(self) -> Value:
        """Word + position + token type 0, normalised."""
        b, name = self.builder, "embeddings.position_embeddings.weight"
        b.scope(EMBEDDINGS)
        dtype = b.dtype(EMBEDDINGS)
        rows = self.tensors[name] + self.tensors["embeddings.token_type_embeddings.weight"][0]
        table = b.weight(name, rows[: self.checkpoint.max_seq_length], dtype)
        words = b.weight("embeddings.word_embeddings.weight", self.tensors["embeddings.word_embeddings.weight"], dtype)
        total = b.op("Add", b.op("Gather", words, "input_ids"), b.op("Slice", table, b.int64(0), self.seq_len))
        return self.layer_norm(EMBEDDINGS, f"{EMBEDDINGS}.LayerNorm", total, dtype)

    def layer(self, i: int, hidden: Value) -> Value:
        """One encoder layer, post-norm."""
        self.builder.scope(f"layer_{i}")
        layer = f"encoder.layer.{i}"
        context = self.attention(f"{layer}.attention.self", hidden)
        hidden = self.residual(f"{layer}.attention.output", context, hidden)
        site = f"{layer}.intermediate"
        dtype = self.builder.dtype(site)
        (inner,) = self.linears(site, ["dense"], hidden)
        self.builder.watch(site, inner, self.builder.cast(hidden, dtype))
        gelu = self.builder.op("Gelu", inner, approximate=GELU_APPROXIMATION[self.config.hidden_act])
        return self.residual(f"{layer}.output", Value(gelu, dtype), hidden)

    def attention(self, site: str, hidden: Value) -> Value:
        """Self-attention; queries are scaled in their weights, pads' scores replaced before an FP32 softmax."""
        b, heads, dtype = self.builder, self.config.num_attention_heads, self.builder.dtype(site)
        head_size = self.config.hidden_size // heads
        parts = self.linears(site, ["query", "key", "value"], hidden)
        split = [b.op("Reshape", part, b.int64(0, 0, heads, head_size)) for part in parts]
        query, value = (b.op("Transpose", split[k], perm=[0, 2, 1, 3]) for k in (0, 2))
        if site in self.int8_sites:  # whose weights are levels, and cannot take the factor up
            scale = b.scalar(f"{site}.query_scale", 1 / math.sqrt(head_size), dtype)
            query = b.op("Mul", query, scale)
        scores = b.op("MatMul", query, b.op("Transpose", split[1], perm=[0, 2, 3, 1]))
        b.watch(site, *parts, scores, b.cast(hidden, dtype))
        masked = b.op(
            "Where",
            b.op("Unsqueeze", self.mask, b.int64(1, 2)),
            b.cast(Value(scores, dtype), FLOAT),
            b.const("masked", _MASKED, np.float32),
        )
        weights = b.cast(Value(b.op("Softmax", masked, axis=-1), FLOAT), dtype)
        context = b.op("Transpose", b.op("MatMul", weights, value), perm=[0, 2, 1, 3])
        return Value(b.op("Reshape", context, b.int64(0, 0, self.config.hidden_size)), dtype)

    def residual(self, site: str, value: Value, hidden: Value) -> Value:
        """A linear layer, what it is added to, and the normalisation of the sum."""
        b, dtype = self.builder, self.builder.dtype(site)
        (outer,) = self.linears(site, ["dense"], value)
        kept = b.cast(hidden, dtype)
        total = b.op("Add", outer, kept)
        b.watch(site, outer, kept, total, b.cast(value, dtype))
        return self.layer_norm(site, f"{site}.LayerNorm", total, dtype)

    def layer_norm(self, site: str, name: str, value: str, dtype: int) -> Value:
        """Layer normalisation; its statistics are FP32 whatever goes in (stash_type is 1 by default)."""
        b = self.builder
        scale, bias = (b.weight(f"{name}.{part}", self.tensors[f"{name}.{part}"], dtype) for part in ("weight", "bias"))
        out = b.op("LayerNormalization", value, scale, bias, axis=-1, epsilon=self.config.layer_norm_eps)
        b.watch(site, value, out)
        return Value(out, dtype)

    def linears(self, site: str, names: Sequence[str], value: Value) -> list[str]:
        """Linear layers that read the same value."""
        b, dtype = self.builder, self.builder.dtype(site)
        x = b.cast(value, dtype)
        quantized = self.int8_sites.get(site) if dtype == FLOAT16 else None
        if quantized is not None and _fits(quantized):
            return self._quantized(site, names, x, quantized)
        outputs = []
        for name in names:
            full = f"{site}.{name}"
            factor = np.float32(1)
            if name == "query" and site not in self.int8_sites:
                factor = np.float32(1 / math.sqrt(self.config.hidden_size // self.config.num_attention_heads))
            weight = b.weight(f"{full}.weight", self.tensors[f"{full}.weight"].T * factor, dtype)
            bias = self.tensors[f"{full}.bias"] * factor
            product = b.op("MatMul", x, weight)
            outputs.append(b.op("Add", product, b.weight(f"{full}.bias", bias, dtype)) if bias.any() else product)
        return outputs

    def _quantized(self, site: str, names: Sequence[str], x: str, quantized: Int8Site) -> list[str]:
        """Linear layers on Q/DQ pairs: int8 around zero, as TensorRT has it, over the range of the CPU's uint8."""
        b = self.builder
        if quantized.divisor is not None:
            x = b.op("Mul", x, b.weight(f"{site}.smoothing", 1 / quantized.divisor, FLOAT16))
        scale = b.scalar(f"{site}.scale", _symmetric_scale(quantized), FLOAT16)
        zero = b.scalar("zero_int8", 0, onnx.TensorProto.INT8)
        x = b.op("DequantizeLinear", b.op("QuantizeLinear", x, scale, zero), scale, zero)
        outputs = []
        for name in names:
            full, linear = f"{site}.{name}", quantized.linears[f"{site}.{name}"]
            weight = b.op(
                "DequantizeLinear",
                b.const(f"{full}.weight", linear.weight),
                b.weight(f"{full}.weight_scale", linear.scale, FLOAT16),
                b.const(f"{full}.weight_zero_point", np.zeros(len(linear.scale), np.int8)),
                axis=1,
            )
            bias = b.weight(f"{full}.bias", linear.bias, FLOAT16)
            outputs.append(b.op("Add", b.op("MatMul", x, weight), bias))
        return outputs

    def pool(self, hidden: Value) -> str:
        """(batch, seq_len, hidden) -> float32 (batch, dim)."""
        b, cells = self.builder, self.builder.cast(hidden, FLOAT)
        (pooling,) = self.checkpoint.pooling
        if pooling == "cls":
            embedding = b.op("Squeeze", b.op("Gather", cells, b.int64(0), axis=1), b.int64(1))
        elif pooling == "mean":
            mask = b.op("Unsqueeze", self.mask, b.int64(2))
            total = b.op("ReduceSum", b.op("Where", mask, cells, b.const("zero_float", 0, np.float32)), b.int64(1),
                         keepdims=0)  # fmt: skip
            embedding = divide_by_lengths(b, total, "lengths")
        else:
            raise unsupported_pooling(pooling)
        return unit(b, embedding) if self.checkpoint.normalize else embedding


def divide_by_lengths(b: HalfBuilder, total: str, lengths: str) -> str:
    """Sums (batch, dim) over int32 lengths (batch,), a text without tokens over one."""
    length = b.op("Max", b.op("Cast", lengths, to=FLOAT), b.const("one_float", 1, np.float32))
    return b.op("Div", total, b.op("Unsqueeze", length, b.int64(1)))


def unit(b: HalfBuilder, embedding: str) -> str:
    """Scale rows to unit length; the bound is torch.nn.functional.normalize's."""
    norm = b.op("ReduceL2", embedding, b.int64(1), keepdims=1)
    return b.op("Div", embedding, b.op("Max", norm, b.const("norm_bound", 1e-12, np.float32)))


def unsupported_pooling(pooling: str) -> ExportError:
    """The error for a pooling that the GPU graphs do not have."""
    return ExportError(f"the graphs for cuda and tensorrt have mean and cls pooling, not {pooling}; use --target cpu")


def _symmetric_scale(site: Int8Site) -> float:
    """The step of int8 around zero that reaches as far as the site's uint8 levels."""
    return max(site.zero_point, 255 - site.zero_point) * site.scale / 127


def _fits(site: Int8Site) -> bool:
    """Whether FP16 holds the scales; a site where it does not stays FP16.

    FP16 ends in steps of 2^-24: at 2^-17 that moves a scale by 0.4 %, as far as INT8 rounds the largest weight.
    """
    scales = np.concatenate([[_symmetric_scale(site)], *(linear.scale for linear in site.linears.values())])
    return bool(scales.min() >= 2.0**-17 and scales.max() <= 65504)
