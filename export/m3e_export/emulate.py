"""A GPU's graph on a machine without one: kernels written out in standard operators, computed in FP32.

Each of onnxruntime's CUDA kernels becomes the arithmetic that it does, and whatever reads FP16 computes in FP32 and is
rounded where it stores: what the exporter certifies is the very file that will be published. The casts stand in the
graph, because those that the CPU provider adds by itself leave out a rounding where it sees two in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from m3e.cpu import available_threads
from m3e.feeds import pack, rectangle
from m3e.session import Session
from m3e_export.builder import CONTRIB, GraphBuilder
from m3e_export.fp16 import FLOAT, FLOAT16


def emulated_session(data: bytes) -> Session:
    """Open a graph for cuda or tensorrt on the CPU.

    Args:
        data: The ONNX file's bytes.
    """
    model = onnx.load_from_string(data)
    lay_out = pack if "token_offset" in {item.name for item in model.graph.input} else rectangle
    rewritten = emulate(model).SerializeToString()
    return Session(rewritten, num_threads=available_threads(), feed=lambda input_ids, _: lay_out(input_ids))


def emulate(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite a graph so that the CPU provider and onnx's reference evaluator can run it.

    Args:
        model: A graph of this exporter.

    Returns:
        The same function in standard operators, checked by onnx with its types and shapes.
    """
    standard = model
    if any(node.domain == CONTRIB for node in model.graph.node):
        standard = _write_out_kernels(model)
    return _compute_in_fp32(standard)


def _write_out_kernels(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace onnxruntime's kernels; each is computed in FP32 and rounded to what its first input is."""
    inputs = {}
    for item in model.graph.input:
        tensor = item.type.tensor_type
        inputs[item.name] = tensor.elem_type, [size.dim_param or size.dim_value for size in tensor.shape.dim]
    b = GraphBuilder(inputs)
    names = {item.name: item.name for item in model.graph.input} | {"": ""}
    for tensor in model.graph.initializer:
        names[tensor.name] = b.const(tensor.name, numpy_helper.to_array(tensor))
    for node in model.graph.node:
        if node.output[0] in {item.name for item in model.graph.output}:
            continue  # the Identity that gives an output its name: the builder adds its own
        arguments = [names[name] for name in node.input]
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.domain == CONTRIB:
            result = _KERNELS[node.op_type](b, *[_float(b, name) for name in arguments], **attributes)
            names[node.output[0]] = b.op("CastLike", result, arguments[0])
        else:
            names[node.output[0]] = b.op(node.op_type, *arguments, **attributes)
    outputs: dict[str, tuple[str, list[int | str]]] = {}
    for node, item in zip(model.graph.node[-len(model.graph.output) :], model.graph.output, strict=True):
        shape = item.type.tensor_type.shape
        outputs[item.name] = names[node.input[0]], [size.dim_param or size.dim_value for size in shape.dim]
    return b.finish(outputs)


def _compute_in_fp32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let every node that reads FP16 read FP32, and round what it makes.

    Args:
        model: A graph of standard operators; branches of an If read no FP16.
    """
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True)
    half = {item.name for item in inferred.graph.value_info if item.type.tensor_type.elem_type == FLOAT16}
    half |= {tensor.name for tensor in model.graph.initializer if tensor.data_type == FLOAT16}
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(model)
    del rewritten.graph.node[:]
    exact: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in ("Cast", "CastLike") or half.isdisjoint(node.input):
            rewritten.graph.node.append(node)
            continue
        for name in half.intersection(node.input).difference(exact):
            exact[name] = f"{name}/fp32"
            rewritten.graph.node.append(helper.make_node("Cast", [name], [exact[name]], to=FLOAT))
        stored = [name for name in node.output if name in half]
        computing = rewritten.graph.node.add()
        computing.CopyFrom(node)
        computing.input[:] = [exact.get(name, name) for name in node.input]
        computing.output[:] = [f"{name}/unrounded" if name in half else name for name in node.output]
        for name in stored:
            rewritten.graph.node.append(helper.make_node("Cast", [f"{name}/unrounded"], [name], to=FLOAT16))
    onnx.checker.check_model(rewritten)
    onnx.shape_inference.infer_shapes(rewritten, check_type=True)
    return rewritten


def _float(b: GraphBuilder, name: str) -> str:
    """FP32 of a value; integers, too, are small enough to be exact, and are cast back where they are used."""
    return name and b.op("Cast", name, to=FLOAT)


def _int64(b: GraphBuilder, name: str) -> str:
    return b.op("Cast", name, to=onnx.TensorProto.INT64)


def _skip_layer_normalization(
    b: GraphBuilder, value: str, skip: str, scale: str, shift: str, bias: str = "", **attributes: Any
) -> str:
    total = b.op("Add", value, skip)
    total = b.op("Add", total, bias) if bias else total
    return b.op("LayerNormalization", total, scale, shift, axis=-1, **attributes)


def _bias_gelu(b: GraphBuilder, value: str, bias: str) -> str:
    return b.op("Gelu", b.op("Add", value, bias))


def _fast_gelu(b: GraphBuilder, value: str, bias: str) -> str:
    return b.op("Gelu", b.op("Add", value, bias), approximate="tanh")


def _restore_padding(b: GraphBuilder, value: str, token_offset: str) -> str:
    """Token k goes to cell token_offset[k] of the rectangle; the other cells are zero."""
    shape = b.op("Shape", token_offset)
    size = b.op("Slice", b.op("Shape", value), b.int64(1), b.int64(2))
    places = _places(b, value, token_offset)
    cells = b.op("Concat", b.op("ReduceProd", shape, keepdims=1), size, axis=0)
    zeros = b.op("ConstantOfShape", cells, value=numpy_helper.from_array(np.zeros(1, np.float32)))
    flat = b.op("ScatterND", zeros, b.op("Unsqueeze", places, b.int64(1)), value)
    return b.op("Reshape", flat, b.op("Concat", shape, size, axis=0))


def _places(b: GraphBuilder, value: str, token_offset: str) -> str:
    """The cells of the real tokens: the first T entries of token_offset, int64 (T,)."""
    count = b.op("Slice", b.op("Shape", value), b.int64(0), b.int64(1))
    return b.op("Slice", b.op("Reshape", _int64(b, token_offset), b.int64(-1)), b.int64(0), count)


def _packed_attention(
    b: GraphBuilder, query: str, key: str, value: str, bias: str, token_offset: str, ends: str, num_heads: int
) -> str:
    """Attention over the padded rectangle, pads masked, and the real tokens taken out again."""
    assert not bias, "the exporter folds the bias of attention away"
    cells = [_restore_padding(b, part, token_offset) for part in (query, key, value)]
    size = b.op("Slice", b.op("Shape", query), b.int64(1), b.int64(2))
    head_size = b.op("Div", size, b.int64(num_heads))
    split = b.op("Concat", b.int64(0, 0, num_heads), head_size, axis=0)
    heads = [b.op("Transpose", b.op("Reshape", part, split), perm=[0, 2, 1, 3]) for part in cells]
    scale = b.op("Sqrt", b.op("Cast", head_size, to=FLOAT))
    scores = b.op("Div", b.op("MatMul", heads[0], b.op("Transpose", heads[1], perm=[0, 1, 3, 2])), scale)
    lengths = b.op(
        "Sub",
        b.op("Slice", ends, b.int64(1), b.int64(np.iinfo(np.int64).max)),
        b.op("Slice", ends, b.int64(0), b.int64(-1)),
    )
    seq_len = b.op("Gather", b.op("Shape", token_offset), b.const("one", 1, np.int64))
    places = b.op("Range", b.const("zero", 0, np.int64), seq_len, b.const("one", 1, np.int64))
    mask = b.op("Less", b.op("Cast", places, to=FLOAT), b.op("Unsqueeze", lengths, b.int64(1)))
    masked = b.op(
        "Where", b.op("Unsqueeze", mask, b.int64(1, 2)), scores, b.const("minus_infinity", -np.inf, np.float32)
    )
    context = b.op("Transpose", b.op("MatMul", b.op("Softmax", masked, axis=-1), heads[2]), perm=[0, 2, 1, 3])
    flat = b.op("Reshape", context, b.op("Concat", b.int64(-1), size, axis=0))
    return b.op("Gather", flat, _places(b, query, token_offset))


_KERNELS: dict[str, Callable[..., str]] = {
    "BiasGelu": _bias_gelu,
    "FastGelu": _fast_gelu,
    "PackedMultiHeadAttention": _packed_attention,
    "RestorePadding": _restore_padding,
    "SkipLayerNormalization": _skip_layer_normalization,
}
