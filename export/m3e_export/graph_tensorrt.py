"""An encoder's weights -> a graph of standard operators for TensorRT: the precision of every value stands in the graph.

TensorRT plans each shape ahead, so texts come as a padded rectangle with their lengths, and TensorRT itself fuses what
belongs together. Strongly typed networks take the element types as they are: FP16, with softmax, the statistics of
normalisation, pooling and the output in FP32, and INT8 where Q/DQ pairs stand.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from m3e_export.architectures import ACTIVATIONS
from m3e_export.checkpoint import Checkpoint, position_rows
from m3e_export.encoder_math import FARTHEST, bias_by_distance
from m3e_export.fit import Int8Site
from m3e_export.fp16 import EMBEDDINGS, FLOAT, FLOAT16, INT32, GpuPoolingNodes, HalfBuilder, Value, fold_biases
from m3e_export.int8 import divide
from m3e_export.pooling_graph import append_function, append_head
from m3e_export.walk import PROJECTIONS, hidden_states

# What a pad's score becomes, in FP32: softmax gives it zero and never meets an infinity.
_MASKED = -1e9
# (batch, seq_len, heads, head_size) and its transposes.
_HEADS, _KEYS = [0, 2, 1, 3], [0, 2, 3, 1]


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
    builder = HalfBuilder(
        {"input_ids": (INT32, ["batch", "seq_len"]), "lengths": (INT32, ["batch"])}, fp32_sites
    )  # fmt: skip
    steps = TensorrtSteps(builder, checkpoint, _quantizable(builder, int8_sites or {}))
    words = steps.words()
    first, *_, last = hidden_states(steps, checkpoint.config, words)
    builder.scope("pooling")
    pooling = RectanglePooling(builder)
    vectors = pooling.pool(checkpoint.pooling, words.name, first.name, last.name)
    vectors = append_head(builder, checkpoint.head, vectors)
    model = builder.finish({"sentence_embedding": (vectors, ["batch", checkpoint.embedding_dim])})
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    return model, builder.watched


@dataclass(frozen=True, slots=True)
class SiteValue(Value):
    """A value and the site that it belongs to."""

    site: str


class TensorrtSteps:
    """The steps of `walk` in standard operators; values are (batch, seq_len, width).

    Args:
        builder: The graph.
        checkpoint: The model; its biases folded, if nothing is quantised.
        int8_sites: What is quantised.
    """

    def __init__(self, builder: HalfBuilder, checkpoint: Checkpoint, int8_sites: Mapping[str, Int8Site]) -> None:
        self._builder, self._checkpoint, self._int8_sites = builder, checkpoint, int8_sites
        self._tensors, self._config = checkpoint.tensors, checkpoint.config
        builder.scope("packing")
        shape = builder.op("Shape", "input_ids")
        self._seq_len = builder.op("Slice", shape, builder.int64(1), builder.int64(2))
        count = builder.const("positions", np.arange(checkpoint.max_seq_length), np.int32)
        self._places = builder.op("Slice", count, builder.int64(0), self._seq_len)
        self._mask = builder.op("Less", self._places, builder.op("Unsqueeze", "lengths", builder.int64(1)))
        self._bias = self._position_bias()

    def scope(self, name: str) -> None:
        """Name the nodes that follow."""
        self._builder.scope(name)

    def words(self) -> SiteValue:
        """Word embeddings."""
        b, name, dtype = self._builder, "embeddings.word_embeddings.weight", self._builder.dtype(EMBEDDINGS)
        return SiteValue(b.op("Gather", b.weight(name, self._tensors[name], dtype), "input_ids"), dtype, EMBEDDINGS)

    def positions(self) -> SiteValue:
        """What is added to the word embeddings."""
        b, dtype, pad = self._builder, self._builder.dtype(EMBEDDINGS), self._config.padding_position
        table = b.weight("embeddings.position_embeddings.weight", position_rows(self._checkpoint), dtype)
        if pad is None:
            return SiteValue(b.op("Slice", table, b.int64(0), self._seq_len), dtype, EMBEDDINGS)
        # Pad tokens in a text, and whatever stands behind its end, have row 0 and are not counted.
        is_pad = b.op("Equal", "input_ids", b.const("pad_token_id", pad, np.int32))
        counted = b.op("Cast", b.op("Not", is_pad), to=FLOAT)  # TensorRT adds up no whole numbers
        count = b.op("CumSum", counted, b.const("one", 1, np.int64))
        rows = b.op("Mul", b.op("Mul", count, counted), b.op("Cast", self._mask, to=FLOAT))
        return SiteValue(b.op("Gather", table, b.op("Cast", rows, to=INT32)), dtype, EMBEDDINGS)

    def linears(self, site: str, names: Sequence[str], x: Value) -> list[SiteValue]:
        """Linear layers of one input."""
        b, dtype = self._builder, self._builder.dtype(site)
        value = b.cast(x, dtype)
        quantized = self._int8_sites.get(site)
        if quantized is not None:
            outputs = self._quantized(site, names, value, quantized)
        else:
            outputs = [self._linear(site, name, value, dtype) for name in names]
        b.watch(site, value, *outputs)
        return [SiteValue(output, dtype, site) for output in outputs]

    def layer_norm(self, name: str, x: SiteValue) -> SiteValue:
        """Layer normalisation; its statistics are FP32 whatever goes in (stash_type is 1 by default)."""
        b = self._builder
        scale, bias = (
            b.weight(f"{name}.{part}", self._tensors[f"{name}.{part}"], x.dtype) for part in ("weight", "bias")
        )
        out = b.op("LayerNormalization", x.name, scale, bias, axis=-1, epsilon=self._config.layer_norm_eps)
        b.watch(x.site, out)
        return SiteValue(out, x.dtype, x.site)

    def add(self, a: SiteValue, b: SiteValue) -> SiteValue:
        """Sum, at the site of the first."""
        other = self._builder.cast(b, a.dtype)
        total = self._builder.op("Add", a.name, other)
        self._builder.watch(a.site, other, total)
        return SiteValue(total, a.dtype, a.site)

    def attention(self, site: str, x: SiteValue) -> SiteValue:
        """Self-attention; queries are scaled in their weights, pads' scores replaced before an FP32 softmax."""
        query, key, value = self.linears(site, PROJECTIONS, x)
        b, heads, dtype = self._builder, self._config.num_attention_heads, query.dtype
        head_size = self._config.hidden_size // heads
        q, k, v = (b.op("Reshape", part.name, b.int64(0, 0, heads, head_size)) for part in (query, key, value))
        q, k, v = (b.op("Transpose", part, perm=perm) for part, perm in ((q, _HEADS), (k, _KEYS), (v, _HEADS)))
        if site in self._int8_sites:  # whose weights are levels, and cannot take the factor up
            q = b.op("Mul", q, b.weight(f"{site}.query_scale", np.array(1 / math.sqrt(head_size), np.float32), dtype))
        scores = b.op("MatMul", q, k)
        b.watch(site, scores)
        exact = b.cast(Value(scores, dtype), FLOAT)
        if self._bias:
            exact = b.op("Add", exact, self._bias)
        masked = b.op(
            "Where", b.op("Unsqueeze", self._mask, b.int64(1, 2)), exact, b.const("masked", _MASKED, np.float32)
        )
        weights = b.cast(Value(b.op("Softmax", masked, axis=-1), FLOAT), dtype)
        context = b.op("Transpose", b.op("MatMul", weights, v), perm=_HEADS)
        return SiteValue(b.op("Reshape", context, b.int64(0, 0, self._config.hidden_size)), dtype, site)

    def activation(self, x: SiteValue) -> SiteValue:
        """The feed-forward block's activation."""
        return SiteValue(append_function(self._builder, ACTIVATIONS[self._config.hidden_act], x.name), x.dtype, x.site)

    def _position_bias(self) -> str:
        """What relative positions add to the scores, FP32 (heads, seq_len, seq_len); empty where nothing."""
        table = self._tensors.get("encoder.relative_attention_bias.weight")
        if table is None:
            return ""
        b = self._builder
        distance = b.op("Sub", b.op("Unsqueeze", self._places, b.int64(0)),
                        b.op("Unsqueeze", self._places, b.int64(1)))  # fmt: skip
        farthest, nearest = b.const("farthest", FARTHEST, np.int32), b.const("minus_farthest", -FARTHEST, np.int32)
        index = b.op("Add", b.op("Max", b.op("Min", distance, farthest), nearest), farthest)
        return b.op("Gather", b.const("relative_attention_bias", bias_by_distance(table)), index, axis=1)

    def _linear(self, site: str, name: str, value: str, dtype: int) -> str:
        b, full = self._builder, f"{site}.{name}"
        factor = np.float32(1)
        if name == "query" and site not in self._int8_sites:
            factor = np.float32(1 / math.sqrt(self._config.hidden_size // self._config.num_attention_heads))
        product = b.op("MatMul", value, b.weight(f"{full}.weight", self._tensors[f"{full}.weight"].T * factor, dtype))
        bias = self._tensors[f"{full}.bias"] * factor
        return b.op("Add", product, b.weight(f"{full}.bias", bias, dtype)) if bias.any() else product

    def _quantized(self, site: str, names: Sequence[str], x: str, quantized: Int8Site) -> list[str]:
        """Linear layers on Q/DQ pairs: int8 around zero, as TensorRT has it, over the range of the CPU's uint8."""
        b = self._builder
        if quantized.divisor is not None:
            x = b.op("Mul", x, b.weight(f"{site}.smoothing", (1 / quantized.divisor).astype(np.float32), FLOAT16))
        scale = b.weight(f"{site}.scale", np.array(_symmetric_scale(quantized), np.float32), FLOAT16)
        zero = b.const("zero_int8", 0, np.int8)
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


class RectanglePooling(GpuPoolingNodes):
    """Poolings of tokens (batch, seq_len, width)."""

    def __init__(self, builder: HalfBuilder) -> None:
        super().__init__(builder, "input_ids", "lengths")

    def _cls(self, tokens: str) -> str:
        return self._float(self._builder.op("Gather", tokens, self._builder.const("zero", 0, np.int64), axis=1))

    def _lasttoken(self, tokens: str) -> str:
        b = self._builder
        last = b.op("Sub", b.op("Cast", "lengths", to=onnx.TensorProto.INT64), b.int64(1))
        return self._float(b.op("GatherND", tokens, b.op("Unsqueeze", last, b.int64(1)), batch_dims=1))

    def _in_cells(self, tokens: str) -> str:
        if tokens not in self._cells:  # zeros at pads, whatever the layers made of them
            b = self._builder
            inside = b.op("Cast", b.op("Unsqueeze", self._mask, b.int64(2)), to=onnx.TensorProto.BOOL)
            self._cells[tokens] = b.op("Where", inside, self._float(tokens), b.const("zero_float", 0, np.float32))
        return self._cells[tokens]


def _symmetric_scale(site: Int8Site) -> float:
    """The step of int8 around zero that reaches as far as the site's uint8 levels."""
    return max(site.zero_point, 255 - site.zero_point) * site.scale / 127


def _quantizable(builder: HalfBuilder, sites: Mapping[str, Int8Site]) -> dict[str, Int8Site]:
    """Leave out what stays FP32 and what FP16 scales cannot hold.

    The sites before and behind an attention go together: one is fitted to what the other makes of its values.
    """
    folded = fold_divisors(sites)
    fitting = {name: site for name, site in folded.items() if builder.dtype(name) == FLOAT16 and _fits(site)}
    for before in [name for name in folded if name.endswith(".attention.self")]:
        pair = {before, before.replace(".self", ".output")}
        if not pair <= fitting.keys():
            fitting = {name: site for name, site in fitting.items() if name not in pair}
    return fitting


def fold_divisors(sites: Mapping[str, Int8Site]) -> dict[str, Int8Site]:
    """Let the value projection divide what attention's output would be divided by.

    Attention mixes rows and keeps channels apart, so a channel's divisor can go into the scale and bias of the value
    projection's column: nothing is left to do at run time.
    """
    folded = dict(sites)
    for name, site in sites.items():
        source = name.replace(".attention.output", ".attention.self")
        if source == name or site.divisor is None or source not in sites:
            continue
        value = f"{source}.value"
        linears = sites[source].linears
        folded[source] = replace(sites[source], linears={**linears, value: divide(linears[value], site.divisor)})
        folded[name] = replace(site, divisor=None)
    return folded


def _fits(site: Int8Site) -> bool:
    """Whether FP16 holds the scales; a site where it does not stays FP16.

    FP16 ends in steps of 2^-24: at 2^-17 that moves a scale by 0.4 %, as far as INT8 rounds the largest weight.
    """
    scales = np.concatenate([[_symmetric_scale(site)], *(linear.scale for linear in site.linears.values())])
    return bool(scales.min() >= 2.0**-17 and scales.max() <= 65504)
