"""An encoder's weights -> ONNX graph, packed: no arithmetic on padding.

Everything but attention works on the T real tokens of a batch, laid end to end as (T, hidden). Around attention
the tokens are gathered into the padded rectangle (batch, seq_len, hidden) and back. Where a row has pads, the
gather repeats a real token; the mask keeps it out of attention and of pooling.

Choices that measurements on CPUs made: Add + LayerNormalization rather than
SkipLayerNormalization, Gemm with bias + Gelu rather than BiasGelu, MultiHeadAttention on unpacked Q, K and V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from m3e.plan import LONGEST_BUCKET
from m3e_export.architectures import ACTIVATIONS
from m3e_export.builder import CONTRIB, RECTANGLE, GraphBuilder
from m3e_export.checkpoint import Checkpoint, position_rows
from m3e_export.encoder_math import FARTHEST, bias_by_distance
from m3e_export.pooling_graph import PoolingNodes, append_function, append_head
from m3e_export.walk import PROJECTIONS, hidden_states


@dataclass(frozen=True, slots=True)
class Packing:
    """Values that relate the packed tokens to the padded rectangle.

    Attributes:
        token_index: int64 (T,), position of each real token in the flattened rectangle.
        place: int64 (T,), its column.
        seq_len: int64 (1,), the number of columns.
        cell_index: int64 (batch, seq_len), the packed token that stands in each cell of the rectangle.
        mask: int32 (batch, seq_len), 1 for real tokens.
        full: bool (), whether there are no pads, and texts are so long that the runtime never gives them any.
        shape: int64 (3,), that of the padded rectangle's vectors, (batch, seq_len, -1).
    """

    token_index: str
    place: str
    seq_len: str
    cell_index: str
    mask: str
    full: str
    shape: str


def build_graph(
    checkpoint: Checkpoint, steps_type: Callable[..., GraphSteps] | None = None, *, with_token_embeddings: bool = False
) -> onnx.ModelProto:
    """Build the graph of a checkpoint.

    Args:
        checkpoint: Weights, config and pooling.
        steps_type: Makes the steps from what `GraphSteps` takes; None for `GraphSteps`, all in FP32.
        with_token_embeddings: Also output ``last_hidden_state`` (batch, seq_len, hidden), zero at pads.

    Returns:
        A model with inputs ``input_ids``, ``attention_mask``, int64 (batch, seq_len), and output
        ``sentence_embedding``, float32 (batch, dim).
    """
    config = checkpoint.config
    builder = GraphBuilder({"input_ids": RECTANGLE, "attention_mask": RECTANGLE})
    packing, ids, positions = pack(builder, config.padding_position)
    steps = (steps_type or GraphSteps)(builder, checkpoint, packing, ids, positions)
    words = steps.words()
    first, *_, last = hidden_states(steps, config, words)
    builder.scope("pooling")
    pooling = PoolingNodes(builder, packing.cell_index, include_prompt=checkpoint.include_prompt)
    vectors = append_head(builder, checkpoint.head, pooling.pool(checkpoint.pooling, words, first, last))
    outputs: dict[str, tuple[str, list[int | str]]] = {
        "sentence_embedding": (vectors, ["batch", checkpoint.embedding_dim])
    }
    if with_token_embeddings:
        cells = masked_cells(builder, last, packing)
        outputs["last_hidden_state"] = (cells, ["batch", "seq_len", config.hidden_size])
    return builder.finish(outputs)


class GraphSteps:
    """The steps of `walk` as nodes of a graph, in FP32; values are names of float32 (T, width).

    Args:
        builder: The graph.
        checkpoint: The model.
        packing: Where the tokens stand.
        ids: Token ids (T,).
        positions: Rows of `position_rows` (T,).
    """

    def __init__(
        self, builder: GraphBuilder, checkpoint: Checkpoint, packing: Packing, ids: str, positions: str
    ) -> None:
        self._builder = builder
        self._checkpoint = checkpoint
        self._packing = packing
        self._ids = ids
        self._positions = positions
        self._bias = _position_bias(builder, checkpoint)

    def scope(self, name: str) -> None:
        """Name the nodes that follow."""
        self._builder.scope(name)

    def words(self) -> str:
        """Word embeddings."""
        name = "embeddings.word_embeddings.weight"
        return self._builder.op("Gather", self._builder.const(name, self._checkpoint.tensors[name]), self._ids)

    def positions(self) -> str:
        """What is added to the word embeddings."""
        rows = position_rows(self._checkpoint)
        name = self._builder.const("embeddings.position_embeddings.weight", rows)
        return self._builder.op("Gather", name, self._positions)

    def linears(self, site: str, names: Sequence[str], x: str) -> list[str]:
        """Linear layers of one input."""
        return [self._linear(f"{site}.{name}", x) for name in names]

    def layer_norm(self, name: str, x: str) -> str:
        """Layer normalisation."""
        weight, bias = (
            self._builder.const(f"{name}.{part}", self._checkpoint.tensors[f"{name}.{part}"])
            for part in ("weight", "bias")
        )
        epsilon = self._checkpoint.config.layer_norm_eps
        return self._builder.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon)

    def add(self, a: str, b: str) -> str:
        """Sum."""
        return self._builder.op("Add", a, b)

    def attention(self, site: str, x: str) -> str:
        """Attention within each text.

        Without pads the tokens are in their cells already, and onnxruntime has a faster kernel where there is no mask.
        It rounds in another order, so short texts, whose batches may have pads, never take it.
        """
        b, packing = self._builder, self._packing
        parts = self.linears(site, PROJECTIONS, x)

        def full() -> str:
            return self._attend([b.op("Reshape", part, packing.shape) for part in parts], "")

        def padded() -> str:
            cells = [b.op("Gather", part, packing.cell_index) for part in parts]
            return b.op("Gather", self._attend(cells, packing.mask), packing.token_index)

        return b.choose(packing.full, full, padded)

    def _linear(self, name: str, value: str) -> str:
        b, tensors = self._builder, self._checkpoint.tensors
        weight = b.const(f"{name}.weight", tensors[f"{name}.weight"].T)  # (in, out)
        return b.op("Gemm", value, weight, b.const(f"{name}.bias", tensors[f"{name}.bias"]))

    def _attend(self, cells: Sequence[str], mask: str) -> str:
        """Attention of query, key and value in cells, (batch, seq_len, hidden) each: (batch x seq_len, hidden)."""
        b, config = self._builder, self._checkpoint.config
        context = b.op(
            "MultiHeadAttention", *cells, *(["", mask, self._bias] if self._bias else ["", mask] if mask else []),
            domain=CONTRIB, num_heads=config.num_attention_heads,
        )  # fmt: skip
        return b.op("Reshape", context, b.int64(-1, config.hidden_size))

    def activation(self, x: str) -> str:
        """The feed-forward block's activation."""
        return append_function(self._builder, ACTIVATIONS[self._checkpoint.config.hidden_act], x)


def pack(builder: GraphBuilder, padding_position: int | None) -> tuple[Packing, str, str]:
    """Find the real tokens: their places, ids (T,) and rows of the position table (T,)."""
    builder.scope("packing")
    shape = builder.op("Shape", "attention_mask")
    mask = builder.op("Reshape", "attention_mask", builder.int64(-1))
    token_index = builder.op("Reshape", builder.op("NonZero", mask), builder.int64(-1))
    ids = builder.op("Gather", builder.op("Reshape", "input_ids", builder.int64(-1)), token_index)
    seq_len = builder.op("Slice", shape, builder.int64(1), builder.int64(2))
    place = builder.op("Mod", token_index, seq_len)
    positions = place
    if padding_position is not None:
        # Pad tokens in a text have row 0 and are not counted (transformers: create_position_ids_from_input_ids).
        is_pad = builder.op("Equal", "input_ids", builder.const("pad_token_id", padding_position, np.int64))
        counted = builder.op("Cast", builder.op("Not", is_pad), to=onnx.TensorProto.INT64)
        counted = builder.op("Mul", counted, "attention_mask")
        count = builder.op("CumSum", counted, builder.const("one", 1, np.int64))
        rows = builder.op("Reshape", builder.op("Mul", count, counted), builder.int64(-1))
        positions = builder.op("Gather", rows, token_index)
    # A running count of real tokens, less one, is the packed place of the last real token up to each cell. Before the
    # first one it is -1, which Gather reads as the last token of all: any token will do.
    count = builder.op("CumSum", mask, builder.const("zero", 0, np.int64))
    cell_index = builder.op("Reshape", builder.op("Sub", count, builder.const("one", 1, np.int64)), shape)
    mask32 = builder.op("Cast", "attention_mask", to=onnx.TensorProto.INT32)
    one = builder.const("one", 1, np.int64)
    no_pads = builder.op("Equal", builder.op("ReduceMin", "attention_mask", keepdims=0), one)
    n_columns = builder.op("Gather", shape, one)
    is_long = builder.op("Greater", n_columns, builder.const("longest_bucket", LONGEST_BUCKET, np.int64))
    full = builder.op("And", no_pads, is_long)
    rectangle = builder.op("Concat", shape, builder.int64(-1), axis=0)
    packing = Packing(
        token_index=token_index, place=place, seq_len=seq_len, cell_index=cell_index, mask=mask32, full=full,
        shape=rectangle,
    )  # fmt: skip
    return packing, ids, positions


def _position_bias(builder: GraphBuilder, checkpoint: Checkpoint) -> str:
    """What relative positions add to attention's scores, (1, heads, seq_len, seq_len); empty where nothing."""
    table = checkpoint.tensors.get("encoder.relative_attention_bias.weight")
    if table is None:
        return ""
    by_distance = builder.const("relative_attention_bias", bias_by_distance(table))
    zero, one = (builder.const(name, value, np.int64) for name, value in (("zero", 0), ("one", 1)))
    seq_len = builder.op("Gather", builder.op("Shape", "attention_mask"), one)
    place = builder.op("Range", zero, seq_len, one)
    distance = builder.op("Sub", builder.op("Unsqueeze", place, builder.int64(0)),
                          builder.op("Unsqueeze", place, builder.int64(1)))  # fmt: skip
    farthest = builder.const("farthest", FARTHEST, np.int64)
    distance = builder.op("Clip", distance, builder.const("minus_farthest", -FARTHEST, np.int64), farthest)
    index = builder.op("Add", distance, farthest)
    return builder.op("Unsqueeze", builder.op("Gather", by_distance, index, axis=1), builder.int64(0))


def masked_cells(builder: GraphBuilder, hidden: str, packing: Packing) -> str:
    """(T, hidden) -> (batch, seq_len, hidden), zero at pads."""
    cells = builder.op("Gather", hidden, packing.cell_index)
    mask = builder.op("Cast", packing.mask, to=onnx.TensorProto.FLOAT)
    return builder.op("Mul", cells, builder.op("Unsqueeze", mask, builder.int64(2)))
