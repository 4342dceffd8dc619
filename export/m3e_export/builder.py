"""Write an ONNX graph down node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

# Opset 20 has Gelu, 17 LayerNormalization; IR 10 is what onnxruntime reads since 1.18.
OPSET = 20
IR_VERSION = 10
CONTRIB = "com.microsoft"
# An input of token ids or of a mask.
RECTANGLE: tuple[int, list[int | str]] = (onnx.TensorProto.INT64, ["batch", "seq_len"])


class GraphBuilder:
    """Collects nodes and initializers; values are named after the node that makes them.

    Args:
        inputs: The graph's inputs by name: element type and shape.

    Attributes:
        nodes: What has been written, in order.
        initializers: Constants by name.
    """

    def __init__(self, inputs: Mapping[str, tuple[int, list[int | str]]]) -> None:
        self._inputs = inputs
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._optional_inputs: list[onnx.ValueInfoProto] = []
        self._scope = ""
        self._n_nodes = 0
        self._contrib = False

    def scope(self, name: str) -> None:
        """Prefix the names of the nodes that follow, so that a profile says where they belong."""
        self._scope = f"{name}/"

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the output's name."""
        name = f"{self._scope}{op_type}_{self._n_nodes}"
        self._n_nodes += 1
        self._contrib |= domain == CONTRIB
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=name, domain=domain, **attributes))
        return name

    def choose(self, condition: str, then: Callable[[], str], otherwise: Callable[[], str]) -> str:
        """Append an If and return its output's name.

        Args:
            condition: bool ().
            then: Appends the nodes for true and returns the name of their float32 result.
            otherwise: The same for false.
        """
        branches = {}
        for key, append in (("then_branch", then), ("else_branch", otherwise)):
            outer, self.nodes = self.nodes, []
            result = helper.make_tensor_value_info(append(), onnx.TensorProto.FLOAT, None)
            branches[key] = helper.make_graph(self.nodes, key, [], [result])
            self.nodes = outer
        return self.op("If", condition, **branches)

    def const(self, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> str:
        """Add an initializer and return its name; the same name again must be the same initializer."""
        tensor = numpy_helper.from_array(np.asarray(value, dtype=dtype, order="C"), name)
        known = self.initializers.setdefault(name, tensor)
        assert known is tensor or known == tensor, f"two initializers would be called {name}"
        return name

    def int64(self, *values: int) -> str:
        """Add a 1-D int64 constant named after its values."""
        return self.const(f"int64_{'_'.join(map(str, values))}", values, np.int64)

    def optional_input(self, name: str, default: int) -> str:
        """Add an input, int64 (1,), that has this value unless it is given."""
        self._optional_inputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [1]))
        return self.const(name, [default], np.int64)

    def include(self, nodes: Iterable[onnx.NodeProto], initializers: Iterable[onnx.TensorProto]) -> None:
        """Append nodes that were made elsewhere, with the initializers that they read."""
        added = list(nodes)
        self.nodes += added
        self._n_nodes += len(added)
        self._contrib |= any(node.domain == CONTRIB for node in added)
        self.initializers |= {initializer.name: initializer for initializer in initializers}

    def finish(self, outputs: dict[str, tuple[str, list[int | str]]]) -> onnx.ModelProto:
        """Close the graph, without what nothing reads.

        Args:
            outputs: For each output of the graph, the value it shows and its shape; all float32.

        Returns:
            The model, checked by onnx.
        """
        self._scope = ""
        for output, (value, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [output], name=output))
        nodes = list(_needed(self.nodes, set(outputs)))[::-1]
        read = {*reads(nodes)}
        graph = helper.make_graph(
            nodes,
            "m3e",
            [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in self._inputs.items()]
            + self._optional_inputs,
            [
                helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
                for name, (_, shape) in outputs.items()
            ],
            [initializer for name, initializer in self.initializers.items() if name in read],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)] + [helper.make_opsetid(CONTRIB, 1)] * self._contrib,
            ir_version=IR_VERSION,
            producer_name="m3e-runtime",
        )
        onnx.checker.check_model(model)
        return model


def _needed(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> Iterator[onnx.NodeProto]:
    """Give the nodes that some values depend on, last first; onnxruntime would run the others too."""
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(reads([node]))
            yield node


def reads(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Names of the values that nodes read, in their branches too."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            yield from reads(attribute.g.node)


def rename_inputs(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Let nodes read other values, in their branches too."""
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:
            rename_inputs(attribute.g.node, names)
