"""A traced encoder -> FP16 where it holds the values, whatever the architecture.

Only what is computed from weights becomes FP16: positions, buckets of distances and rotation angles would lose the
units that they count in, and masks reach FP32's lowest number. Of the rest, matrix products, what is added to and
multiplied with them, activations, layer normalisation (its statistics are FP32 by definition) and what moves values
about are FP16, node by node, unless calibration texts showed values beyond FP16. Softmax, reductions and whatever is
not named here stay FP32.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from m3e.feeds import Feeds, pad
from m3e_export.builder import reads, rename_inputs
from m3e_export.fp16 import FLOAT, FLOAT16, LARGEST, HalfBuilder, Value, beyond, measure

_SUMS = ("Add", "Sub")
_ARITHMETIC = (
    "MatMul", "Gemm", "Mul", "Div", "Neg", "LayerNormalization", "Gelu", "Erf", "Relu", "Sigmoid", "Tanh",
)  # fmt: skip
_MOVES = (
    "Concat", "Expand", "Gather", "GatherElements", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
)  # fmt: skip
# Texts that are padded to one length while values are measured: what pads become is computed with, too.
_BATCH_SIZE = 8


def choose_fp32_nodes(encoder: onnx.ModelProto, input_ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """Run texts through a traced encoder and find the nodes whose values FP16 cannot hold.

    Args:
        encoder: What `optimum_frontend.trace_encoder` has made.
        input_ids: Token ids of the texts.

    Returns:
        Of the nodes that could be FP16 those that must stay FP32, by their first output, each with the farthest of the
        values that it reads or makes.
    """
    types, constants = _types(encoder), {tensor.name: tensor for tensor in encoder.graph.initializer}
    candidates = _candidates(encoder, types)
    values = sorted({name for node in candidates for name in _floats(node, types) if name not in constants})
    measured = copy.deepcopy(encoder)
    peaks = dict(zip(values, measure(measured, values, _batches(input_ids)), strict=True))
    for name, tensor in constants.items():
        if types[name] == FLOAT:
            array = numpy_helper.to_array(tensor)
            peak = float(np.abs(array).max(initial=0))
            # The small values of a bias are added to large ones, and lose nothing that these would keep.
            peaks[name] = peak if array.ndim != 1 or array.size == 1 or peak > LARGEST else 1.0
    outside = {node.output[0]: beyond([peaks[name] for name in _floats(node, types)]) for node in candidates}
    return {name: value for name, value in outside.items() if value}


def to_fp16(encoder: onnx.ModelProto, fp32_nodes: Collection[str]) -> onnx.ModelProto:
    """Rewrite a traced encoder in FP16.

    Args:
        encoder: What `optimum_frontend.trace_encoder` has made.
        fp32_nodes: First outputs of nodes that stay FP32.

    Returns:
        The same function; its output is FP16 or FP32.
    """
    types, constants = _types(encoder), {tensor.name: tensor for tensor in encoder.graph.initializer}
    half = {node.output[0] for node in _candidates(encoder, types)}.difference(fp32_nodes)
    builder = HalfBuilder({}, ())
    builder.scope("fp16")
    made = dict.fromkeys(types, FLOAT)
    for original in encoder.graph.node:
        node = copy.deepcopy(original)
        dtype = FLOAT16 if node.output[0] in half else FLOAT
        names = {}
        for name in reads([node]):
            if types.get(name) != FLOAT or made[name] == dtype:
                continue
            if name in constants:
                names[name] = builder.weight(f"{name}/fp16", numpy_helper.to_array(constants[name]), dtype)
            else:
                names[name] = builder.cast(Value(name, made[name]), dtype)
        rename_inputs([node], names)
        builder.include([node], [])
        made |= {name: dtype for name in node.output if types.get(name) == FLOAT}
    rewritten = copy.deepcopy(encoder)
    del rewritten.graph.node[:], rewritten.graph.initializer[:], rewritten.graph.value_info[:]
    rewritten.graph.node.extend(builder.nodes)
    read = set(reads(builder.nodes))
    rewritten.graph.initializer.extend(tensor for name, tensor in constants.items() if name in read)
    rewritten.graph.initializer.extend(builder.initializers.values())
    for output in rewritten.graph.output:
        output.type.tensor_type.elem_type = made[output.name]
    return rewritten


def _candidates(encoder: onnx.ModelProto, types: dict[str, int]) -> list[onnx.NodeProto]:
    """The nodes that are FP16 where it holds their values."""
    constants = {tensor.name for tensor in encoder.graph.initializer}
    learned = {
        tensor.name
        for tensor in encoder.graph.initializer
        if tensor.data_type == FLOAT and sum(size > 1 for size in tensor.dims) >= 2
    }
    candidates = []
    for node in encoder.graph.node:
        floats = [name for name in reads([node]) if types.get(name) == FLOAT]
        if learned.isdisjoint(floats):
            continue
        learned.update(name for name in node.output if types.get(name) == FLOAT)
        if not types.keys() >= {*node.input, *node.output} - {""}:
            continue  # of a type that onnx does not infer
        # Masks, which no text need have shown at their lowest, are added and computed from no weight.
        if node.op_type in (*_ARITHMETIC, *_MOVES) or (
            node.op_type in _SUMS and learned.union(constants).issuperset(floats)
        ):
            candidates.append(node)
    return candidates


def _floats(node: onnx.NodeProto, types: dict[str, int]) -> list[str]:
    """The FP32 values that a node reads or makes."""
    return [name for name in (*node.input, *node.output) if types.get(name) == FLOAT]


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of the values, as far as onnx infers them."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {item.name: item.type.tensor_type.elem_type for item in (*graph.input, *graph.value_info, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _batches(input_ids: Sequence[Sequence[int]]) -> Iterator[Feeds]:
    for start in range(0, len(input_ids), _BATCH_SIZE):
        yield pad(input_ids[start : start + _BATCH_SIZE])
