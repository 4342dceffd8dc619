"""INT8 storage of weights, and the nodes that compute with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from m3e_export.builder import CONTRIB, GraphBuilder
from m3e_export.checkpoint import Checkpoint
from m3e_export.encoder_math import WEIGHT_LEVELS
from m3e_export.fit import AttentionSteps, Float32Array, Int8Linear, Int8Site
from m3e_export.graph import GraphSteps, Packing

FLOAT = 1  # onnx.TensorProto.FLOAT


class Int8Steps(GraphSteps):
    """The steps with word embeddings as int8 rows, and linear layers and attention on 8-bit integers.

    uint8 activations times int8 weights is the product that VNNI computes; bias and scales are in the multiplication's
    epilogue, so nothing but the result is written. Attention's sums are of whole numbers too, so they are the same in
    whatever order, and whatever the width of the rectangle that a text lies in.

    Args:
        builder: The graph.
        checkpoint: The model.
        packing: Where the tokens stand.
        ids: Token ids (T,).
        positions: Rows of `position_rows` (T,).
        sites: What calibration made; linear layers that are in none stay FP32.
        signed: Whether key and value are int8; as uint8 they are slower where there is VNNI, and do not saturate where
            there is none.
    """

    def __init__(
        self,
        builder: GraphBuilder,
        checkpoint: Checkpoint,
        packing: Packing,
        ids: str,
        positions: str,
        *,
        sites: Mapping[str, Int8Site],
        signed: bool,
    ) -> None:
        super().__init__(builder, checkpoint, packing, ids, positions)
        self._sites = sites
        self._head_size = checkpoint.config.hidden_size // checkpoint.config.num_attention_heads
        self._one = builder.const("one_float", 1, np.float32)
        self._middle = builder.const("middle", 128, np.uint8)
        self._zero = builder.const("key_zero_point", 0, np.int8) if signed else self._middle
        self._lay_out_heads()

    def words(self) -> str:
        """Word embeddings."""
        levels, scales = quantize_rows(self._checkpoint.tensors["embeddings.word_embeddings.weight"])
        return append_rows(self._builder, "embeddings.word_embeddings", levels, scales, self._ids)

    def linears(self, site: str, names: Sequence[str], x: str) -> list[str]:
        """Linear layers of one input."""
        if site not in self._sites:
            return super().linears(site, names, x)
        fitted = self._sites[site]
        # What comes out of attention is levels already.
        levels = x if site.endswith(".attention.output") else append_levels(self._builder, site, fitted, x)
        full = [f"{site}.{name}" for name in names]
        return [append_product(self._builder, name, site, levels, fitted.linears[name]) for name in full]

    def attention(self, site: str, x: str) -> str:
        """Attention within each text: from float32 (T, hidden) to the output layer's levels, uint8 (T, hidden).

        Weights are rounded before they are divided by their sum, so that all of a uint8 serves each row, and the sum is
        that of the rounded.
        """
        b, fitted, output_site = self._builder, self._sites[site], site.replace(".self", ".output")
        steps, output = fitted.attention, self._sites[output_site]
        assert steps is not None, "calibration gives attention its steps"
        assert output.divisor is not None, "calibration divides attention's output by the steps of the value"
        queries, keys, values = self._round_projections(site, fitted, steps, x)
        score_scale = steps.query[0] * steps.key[0] / math.sqrt(self._head_size)
        scores = self._product(
            queries, keys, b.const(f"{site}.score_scale", score_scale, np.float32), self._middle, self._zero
        )
        weights = b.op(
            "QuantizeLinear", b.op("Exp", self._less_largest(scores)),
            b.const("weight_scale", 1 / WEIGHT_LEVELS, np.float32), b.const("weight_zero_point", 0, np.uint8),
        )  # fmt: skip
        value_scale = b.const(f"{site}.value_scale", steps.value[0] / output.divisor[0], np.float32)
        total = self._product(weights, values, value_scale, "weight_zero_point", self._zero)
        context = b.op("Div", total, self._product(weights, self._ones, self._one))
        levels = append_levels(b, output_site, replace(output, divisor=None), context)
        rows = b.op("Reshape", levels, b.int64(-1, self._head_size))
        hidden_size = self._checkpoint.config.hidden_size
        return b.op("Reshape", b.op("Gather", rows, self._context_rows), b.int64(-1, hidden_size))

    def _round_projections(self, site: str, fitted: Int8Site, steps: AttentionSteps, x: str) -> tuple[str, str, str]:
        """Query and value, (batch, heads, seq_len, head_size), and key, its last two axes swapped, in whole steps."""
        b, linears = self._builder, fitted.linears
        levels = append_levels(b, site, fitted, x)
        key_value = concatenate(
            divide(linears[f"{site}.key"], steps.key), divide(linears[f"{site}.value"], steps.value)
        )
        query = append_product(b, f"{site}.query", site, levels, divide(linears[f"{site}.query"], steps.query))
        pairs = append_product(b, f"{site}.key_value", site, levels, key_value)
        heads = b.int64(-1, self._head_size)
        queries = b.op("Reshape", b.op("QuantizeLinear", query, self._one, self._middle), heads)
        rows = b.op("Reshape", b.op("QuantizeLinear", pairs, self._one, self._zero), heads)
        keys = b.op("Transpose", b.op("Gather", rows, self._key_rows), perm=[0, 1, 3, 2])
        return b.op("Gather", queries, self._query_rows), keys, b.op("Gather", rows, self._value_rows)

    def _product(self, a: str, b: str, scale: str, *zero_points: str) -> str:
        return self._builder.op("MatMulIntegerToFloat", a, b, scale, self._one, *zero_points, domain=CONTRIB)

    def _less_largest(self, scores: str) -> str:
        """Scores less the largest of their row; pads' scores are so low that their weights are zero."""
        b = self._builder
        for addend in (self._bias, self._mask):
            scores = b.op("Add", scores, addend) if addend else scores
        return b.op("Sub", scores, b.op("ReduceMax", scores, b.int64(-1)))

    def _lay_out_heads(self) -> None:
        """Find the rows of (T x heads, head_size) that stand in (batch, heads, seq_len), and the way back."""
        b, packing, n_heads = self._builder, self._packing, self._checkpoint.config.num_attention_heads
        heads = b.const("heads", np.arange(n_heads)[:, None], np.int64)
        cells = b.op("Unsqueeze", packing.cell_index, b.int64(1))
        # A token has a row of queries a head; and twice as many of keys, then of values.
        self._query_rows = b.op("Add", b.op("Mul", cells, b.int64(n_heads)), heads)
        self._key_rows = b.op("Add", b.op("Mul", cells, b.int64(2 * n_heads)), heads)
        self._value_rows = b.op("Add", self._key_rows, b.int64(n_heads))
        row = b.op("Sub", packing.token_index, packing.place)
        first = b.op("Add", b.op("Mul", row, b.int64(n_heads)), packing.place)
        by_head = b.op("Mul", b.const("heads_row", np.arange(n_heads), np.int64), packing.seq_len)
        self._context_rows = b.op("Add", b.op("Unsqueeze", first, b.int64(1)), by_head)
        self._ones = b.op(
            "Expand", b.const("level_one", [[1]], np.int8), b.op("Concat", packing.seq_len, b.int64(1), axis=0)
        )
        pads = b.op("Sub", b.op("Cast", "attention_mask", to=FLOAT), self._one)  # -1 at pads
        lowest = b.op("Mul", pads, b.const("lowest", 1e9, np.float32))
        self._mask = b.op("Unsqueeze", lowest, b.int64(1, 2))


def append_site(builder: GraphBuilder, name: str, site: Int8Site, value: str) -> dict[str, str]:
    """Append a site's layers on the value that they read, (..., in): float32 (..., out) of each, by its name."""
    levels = append_levels(builder, name, site, value)
    return {full: append_product(builder, full, name, levels, linear) for full, linear in site.linears.items()}


def append_levels(builder: GraphBuilder, name: str, site: Int8Site, value: str) -> str:
    """Append the rounding of a site's input, float32 (..., in): uint8 (..., in)."""
    if site.divisor is not None:
        value = builder.op("Mul", value, builder.const(f"{name}.smoothing", 1 / site.divisor, np.float32))
    scale = builder.const(f"{name}.scale", site.scale, np.float32)
    zero_point = builder.const(f"{name}.zero_point", site.zero_point, np.uint8)
    return builder.op("QuantizeLinear", value, scale, zero_point)


def append_product(builder: GraphBuilder, name: str, site: str, levels: str, linear: Int8Linear) -> str:
    """Append a linear layer on the levels of its site: float32 (..., out)."""
    return builder.op(
        "MatMulIntegerToFloat",
        levels,
        builder.const(f"{name}.weight", linear.weight),
        f"{site}.scale",
        builder.const(f"{name}.weight_scale", linear.scale),
        f"{site}.zero_point",
        builder.const(f"{name}.weight_zero_point", np.zeros(len(linear.scale), np.int8)),
        builder.const(f"{name}.bias", linear.bias),
        domain=CONTRIB,
    )


def append_rows(
    builder: GraphBuilder, name: str, levels: npt.NDArray[np.int8], scales: npt.NDArray[np.float32], ids: str
) -> str:
    """Append the look-up of rows that `quantize_rows` has made: float32 (..., dim) of ids (...)."""
    found = builder.op("Gather", builder.const(f"{name}.levels", levels), ids)
    factors = builder.op("Gather", builder.const(f"{name}.scales", scales), ids)
    return builder.op("Mul", builder.op("Cast", found, to=FLOAT), factors)


def quantize_rows(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Quantise each row by its own largest value.

    Args:
        rows: float32 (n, dim).

    Returns:
        Levels, int8 (n, dim), and scales, float32 (n, 1).
    """
    scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / np.float32(127), np.float32(1e-12))
    return np.rint(rows / scales).astype(np.int8), scales


def divide(linear: Int8Linear, divisor: Float32Array) -> Int8Linear:
    """A layer whose outputs are divided by float32 (out,)."""
    return replace(linear, scale=linear.scale / divisor, bias=linear.bias / divisor)


def concatenate(first: Int8Linear, second: Int8Linear) -> Int8Linear:
    """One layer with the outputs of two."""
    return Int8Linear(
        np.concatenate([first.weight, second.weight], axis=1),
        np.concatenate([first.scale, second.scale]),
        np.concatenate([first.bias, second.bias]),
    )
