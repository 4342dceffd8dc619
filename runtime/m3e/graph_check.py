"""What a graph may hold, read from the ONNX file's bytes before onnxruntime sees one of them.

A strict reader of protobuf's wire format (protobuf.dev/programming-guides/encoding) for the messages of onnx.proto.
Each message has a table of the fields that a graph of the exporter may have; no table leads back to an earlier one, so
nothing nests without end: an If has branches, a branch has none. What is in no table is refused: files beside the
graph, deeper subgraphs, functions, training.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from m3e.errors import BundleError
from m3e.manifest import Graph

# Far above any encoder's graph, and read in a second.
_MAX_FIELDS = 100_000
_DOMAINS = ("", "com.microsoft")
# Opens a file or a compiled engine that the graph names.
_REFUSED_OPS = ("com.microsoft::EPContext",)
# TensorProto.DataType -> bytes of an element. No strings, no types narrower than a byte.
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}

# Field number -> name, type and, for a field that may come more than once, "*". An upper-case type is a message.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {
        1: "ir_version int", 2: "producer_name bytes", 3: "producer_version bytes", 4: "domain bytes",
        5: "model_version int", 6: "doc_string bytes", 7: "graph Graph", 8: "opset_import OperatorSet *",
    },
    "OperatorSet": {1: "domain bytes", 2: "version int"},
    "Graph": {
        1: "node Node *", 2: "name bytes", 5: "initializer Tensor *", 10: "doc_string bytes", 11: "input Value *",
        12: "output Value *", 13: "value_info Value *",
    },
    "Node": {
        1: "input bytes *", 2: "output bytes *", 3: "name bytes", 4: "op_type bytes", 5: "attribute Attribute *",
        6: "doc_string bytes", 7: "domain bytes", 9: "metadata_props bytes *",
    },
    "Attribute": {
        1: "name bytes", 2: "f float", 3: "i int", 4: "s bytes", 5: "t Tensor", 6: "g Branch", 7: "floats float *",
        8: "ints int *", 9: "strings bytes *", 13: "doc_string bytes", 20: "type int",
    },
    "Tensor": {
        1: "dims int *", 2: "data_type int", 8: "name bytes", 9: "raw_data bytes", 12: "doc_string bytes",
        14: "data_location int",
    },
    "Value": {1: "name bytes", 2: "type Type", 3: "doc_string bytes"},
    "Type": {1: "tensor_type TensorType", 6: "denotation bytes"},
    "TensorType": {1: "elem_type int", 2: "shape Shape"},
    "Shape": {1: "dim Dimension *"},
    "Dimension": {1: "dim_value int", 2: "dim_param bytes", 3: "denotation bytes"},
}  # fmt: skip
# A branch of an If: a graph whose nodes have no branches of their own.
_FIELDS["Branch"] = _FIELDS["Graph"] | {1: "node BranchNode *"}
_FIELDS["BranchNode"] = _FIELDS["Node"] | {5: "attribute BranchAttribute *"}
_FIELDS["BranchAttribute"] = {number: field for number, field in _FIELDS["Attribute"].items() if number != 6}
_PARSED: dict[str, dict[int, tuple[str, str, bool]]] = {
    message: {number: (field.split()[0], field.split()[1], field.endswith("*")) for number, field in fields.items()}
    for message, fields in _FIELDS.items()
}
# For the message alone; what else is unknown is refused by its number.
_REFUSED = {
    ("Model", 14): "metadata_props", ("Model", 20): "training_info", ("Model", 25): "functions",
    ("Graph", 15): "sparse_initializer", ("BranchAttribute", 6): "a subgraph in a subgraph",
    ("Attribute", 11): "subgraphs", ("Attribute", 10): "tensors", ("Attribute", 21): "ref_attr_name",
    ("Attribute", 22): "sparse_tensor", ("Attribute", 23): "sparse_tensors", ("Tensor", 4): "float_data",
    ("Tensor", 5): "int32_data",
    ("Tensor", 6): "string_data", ("Tensor", 7): "int64_data", ("Tensor", 13): "external_data",
}  # fmt: skip
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRE = {"int": _VARINT, "float": _FIXED32}

Message = defaultdict[str, list[Any]]


def check_graph(data: bytes, graph: Graph) -> None:
    """Refuse a graph that is not what its manifest says, or that holds more than operators and their weights.

    Weights are not copied and not looked at: their size alone is compared with their shape.

    Args:
        data: The ONNX file.
        graph: Its entry in the manifest: file, opset, IR version, operators and outputs.

    Raises:
        BundleError: The message names the file and what is wrong.
    """
    try:
        model = _Reader().read(memoryview(data), "Model")
        _check_model(model, graph)
        _check_nodes(_one(model, "graph"), graph.ops)
    except ValueError as error:  # UnicodeDecodeError is one
        raise BundleError(
            f"{graph.file} is refused before it is opened: {error}. It was not written by this exporter; convert the "
            "checkpoint again"
        ) from error


class _Reader:
    """Reads messages, and counts their fields: the work is bounded whatever the file's size."""

    def __init__(self) -> None:
        self._n_fields = 0

    def read(self, data: memoryview, kind: str) -> Message:
        """Read a message of `_FIELDS`: lists of values by name, bytes as views."""
        fields = _PARSED[kind]
        message: Message = defaultdict(list)
        position = 0
        while position < len(data):
            self._count()
            tag, position = _varint(data, position)
            number, wire = tag >> 3, tag & 7
            if number not in fields:
                raise ValueError(f"{kind} has {_REFUSED.get((kind, number), f'an unknown field {number}')}")
            name, type_, repeated = fields[number]
            if message[name] and not repeated:
                raise ValueError(f"{kind}.{name} is there twice")
            value, position = _value(data, position, wire)
            packed = repeated and wire == _BYTES and type_ in _WIRE
            if wire != _WIRE.get(type_, _BYTES) and not packed:
                raise ValueError(f"{kind}.{name} has wire type {wire}")
            if type_ in _PARSED:
                message[name].append(self.read(value, type_))
            elif packed and type_ == "int":
                message[name] += self._integers(value)
            else:
                message[name].append(value)
        return message

    def _integers(self, data: memoryview) -> list[int]:
        values, position = [], 0
        while position < len(data):
            self._count()
            value, position = _varint(data, position)
            values.append(value)
        return values

    def _count(self) -> None:
        self._n_fields += 1
        if self._n_fields > _MAX_FIELDS:
            raise ValueError(f"it has more than {_MAX_FIELDS} fields")


def _value(data: memoryview, position: int, wire: int) -> tuple[Any, int]:
    """The value at a position, an int or a view, and the position behind it."""
    if wire == _VARINT:
        return _varint(data, position)
    if wire == _BYTES:
        size, position = _varint(data, position)
    else:
        sizes = {_FIXED64: 8, _FIXED32: 4}
        if wire not in sizes:
            raise ValueError(f"wire type {wire} is unknown")
        size = sizes[wire]
    end = position + size
    if end > len(data):
        raise ValueError(f"a field of {size} bytes ends behind the message that holds it")
    return data[position:end], end


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    result = 0
    for i in range(10):
        if position + i >= len(data):
            raise ValueError("it ends within a number")
        byte = data[position + i]
        result |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return result, position + i + 1
    raise ValueError("a number is longer than 64 bits")


def _check_model(model: Message, graph: Graph) -> None:
    opsets = [(_text(opset, "domain"), _one(opset, "version")) for opset in model["opset_import"]]
    for domain, _ in opsets:
        if domain not in _DOMAINS:
            raise ValueError(f"it imports operators of the domain {domain!r}, allowed are '' and 'com.microsoft'")
    if dict(opsets).get("") != graph.opset or len(dict(opsets)) != len(opsets):
        raise ValueError(f"its operator sets are {opsets}, the manifest says opset {graph.opset}")
    if (ir_version := _one(model, "ir_version")) != graph.ir_version:
        raise ValueError(f"its IR version is {ir_version}, the manifest says {graph.ir_version}")
    outputs = tuple(_text(output, "name") for output in _one(model, "graph")["output"])
    if outputs != graph.outputs:
        raise ValueError(f"its outputs are {outputs}, the manifest says {graph.outputs}")


def _check_nodes(graph: Message, ops: tuple[str, ...]) -> None:
    """Check a graph's weights and operators, or a branch's."""
    for tensor in graph["initializer"]:
        _check_tensor(tensor)
    for node in graph["node"]:
        _check_node(node, ops)


def _check_node(node: Message, ops: tuple[str, ...]) -> None:
    domain, op_type = _text(node, "domain"), _text(node, "op_type")
    if domain not in _DOMAINS:
        raise ValueError(f"the operator {op_type} is of the domain {domain!r}, allowed are '' and 'com.microsoft'")
    op = f"{domain}::{op_type}" if domain else op_type
    if op in _REFUSED_OPS or op not in ops:
        raise ValueError(f"the operator {op} is not allowed; the manifest says {', '.join(ops)}")
    for attribute in node["attribute"]:
        for tensor in attribute["t"]:
            _check_tensor(tensor)
        if attribute["g"] and op != "If":
            raise ValueError(f"the operator {op} has a subgraph")
        for branch in attribute["g"]:
            _check_nodes(branch, ops)


def _check_tensor(tensor: Message) -> None:
    name, dims = _text(tensor, "name"), tensor["dims"]
    if any(tensor["data_location"]):
        raise ValueError(f"the values of {name!r} lie in another file (data_location)")
    item_bytes = _ITEM_BYTES.get(_one(tensor, "data_type"))
    if item_bytes is None:
        raise ValueError(f"{name!r} has the data type {_one(tensor, 'data_type')}, which is not allowed")
    held = sum(map(len, tensor["raw_data"]))
    # A negative size is an enormous one here: two's complement in 64 bits.
    if len(dims) > 8 or any(dim >> 31 for dim in dims) or math.prod(dims) * item_bytes != held:
        raise ValueError(f"{name!r} claims the shape {dims[:8]} and holds {held} bytes")


def _one(message: Message, name: str) -> Any:
    """A field that must be there."""
    if not message[name]:
        raise ValueError(f"it has no {name}")
    return message[name][0]


def _text(message: Message, name: str) -> str:
    """A string field; empty where there is none."""
    return str(message[name][0], "utf-8") if message[name] else ""
