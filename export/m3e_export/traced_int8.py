"""A traced graph's linear layers -> INT8, whatever the architecture.

A site is a value of the graph with the products that read it and have a constant matrix on their other side. The graph
is run in steps, each up to the next site, on texts without padding: once as it is, and once with the sites before in
INT8. From what arrives there a site is fitted as `calibrate` says. Everything between the products stays FP32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from m3e.cpu import available_threads
from m3e.errors import CheckpointError
from m3e.feeds import Feeds, pad
from m3e.progress import progress_bar
from m3e.session import import_onnxruntime
from m3e.vectors import normalize as unit_rows
from m3e_export.builder import CONTRIB, GraphBuilder, reads
from m3e_export.fit import Float32Array, Int8Site, fit_site
from m3e_export.int8 import append_rows, append_site, quantize_rows
from m3e_export.quantize import GOOD_MEAN, GOOD_MIN

OUTPUT = "sentence_embedding"
_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Step:
    """Nodes that are computed together: the products of a site, or what lies between two sites.

    Attributes:
        nodes: In an order in which they can be computed.
        site: The value that the products read; empty for other nodes.
    """

    nodes: list[onnx.NodeProto]
    site: str = ""


def quantize_traced(
    model: onnx.ModelProto,
    input_ids: Sequence[Sequence[int]],
    *,
    max_level: int = 127,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, Int8Site]:
    """Quantise the linear layers of a traced graph, as many as its accuracy bears.

    Where the cosines are low, products that have fewer outputs than inputs stay FP32: the second layers of feed-forward
    blocks, as `quantize.LADDER` has it.

    Args:
        model: The graph that `optimum_frontend.build_traced_graph` has made.
        input_ids: Token ids of the calibration texts.
        max_level: Largest absolute weight level.
        report: Called with a line of text at each step.

    Returns:
        Sites by the value that they quantise; products of other values stay FP32.

    Raises:
        CheckpointError: No product has a constant matrix.
    """
    batches = list(_equal_lengths(input_ids))
    sites: dict[str, Int8Site] = {}
    for narrowing in (True, False):
        report(f"calibrating on {len(input_ids)} texts" + ("" if narrowing else ", layers that narrow in FP32"))
        sites, cosines = _calibrate(model, batches, narrowing, max_level)
        report(f"mean cosine {cosines.mean():.5f}, lowest {cosines.min():.4f}")
        if cosines.mean() >= GOOD_MEAN and cosines.min() >= GOOD_MIN:
            break
    if not sites:
        raise CheckpointError("the traced graph has no linear layers that INT8 can compute; use --precision fp32")
    return sites


def to_int8(model: onnx.ModelProto, sites: Mapping[str, Int8Site]) -> onnx.ModelProto:
    """Rewrite a traced graph: its sites in INT8, its word embeddings as int8 rows, the rest as it is."""
    made = GraphBuilder({})
    for step in _split(model):
        made.include(*_int8_nodes(step, _matrices(model), sites))
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    del quantized.graph.node[:], quantized.graph.initializer[:]
    quantized.graph.node.extend(made.nodes)
    read = {*reads(made.nodes), *(item.name for item in model.graph.input)}
    quantized.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    quantized.graph.initializer.extend(made.initializers.values())
    quantized.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    onnx.checker.check_model(quantized)
    return quantized


def _calibrate(
    model: onnx.ModelProto, batches: Sequence[Sequence[Sequence[int]]], narrowing: bool, max_level: int
) -> tuple[dict[str, Int8Site], Float32Array]:
    """Fit the sites; also the cosine of each text's vector, quantised against exact, float32 (n,)."""
    steps, matrices = _split(model), _matrices(model)
    exact, quantized = (_Run(model, batches) for _ in range(2))
    sites: dict[str, Int8Site] = {}
    with progress_bar(sum(bool(step.site) for step in steps), "site") as progress:
        for i, step in enumerate(steps):
            needed = {OUTPUT, *(name for later in steps[i + 1 :] for name in reads(later.nodes))}
            if step.site:
                weights = [matrices[node.input[1]] for node in step.nodes]
                if narrowing or sum(weight.shape[1] for weight in weights) >= len(weights[0]):
                    x = exact.rows(step.site)
                    targets = [x @ weight for weight in weights]
                    names = [node.output[0] for node in step.nodes]
                    sites[step.site] = fit_site(names, weights, targets, quantized.rows(step.site), max_level)
                progress.update(1)
            exact.advance(step.nodes, [], needed)
            quantized.advance(*_int8_nodes(step, matrices, sites), needed)
    units = [unit_rows(run.rows(OUTPUT)) for run in (exact, quantized)]
    return sites, (units[0] * units[1]).sum(axis=1)


class _Run:
    """A graph's values on batches of texts, as far as it has been computed and they are still needed.

    Args:
        model: The graph.
        batches: Token ids of texts of one length each.
    """

    def __init__(self, model: onnx.ModelProto, batches: Sequence[Sequence[Sequence[int]]]) -> None:
        self._model = model
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._batches: list[Feeds] = [pad(texts) for texts in batches]
        self._num_threads = available_threads()
        self._most = sum(len(ids) for texts in batches for ids in texts)

    def rows(self, name: str) -> Float32Array:
        """A value of all batches as rows of its last axis, at most one for each token of the texts."""
        parts = [values[name].reshape(-1, values[name].shape[-1]) for values in self._batches]
        return np.concatenate(parts)[: self._most]

    def advance(
        self, nodes: Sequence[onnx.NodeProto], initializers: Iterable[onnx.TensorProto], needed: set[str]
    ) -> None:
        """Compute nodes; of all values those stay that are needed later."""
        read = set(reads(nodes))
        outputs = [name for node in nodes for name in node.output if name in needed]
        graph = helper.make_graph(
            nodes,
            "step",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
                for name, value in self._batches[0].items()
                if name in read
            ],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [*initializers, *(tensor for name, tensor in self._constants.items() if name in read)],
        )
        opsets = [helper.make_opsetid("", self._model.opset_import[0].version), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self._model.ir_version)
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._num_threads
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        inputs = [item.name for item in graph.input]
        for i, values in enumerate(self._batches):
            made = session.run(outputs, {name: values[name] for name in inputs}) if outputs else []
            kept = {name: value for name, value in values.items() if name in needed}
            self._batches[i] = kept | dict(zip(outputs, made, strict=True))


def _split(model: onnx.ModelProto) -> list[Step]:
    """The graph in steps; the products of a site stand where the first of them stood."""
    matrices = _matrices(model)
    products: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in matrices:
            products.setdefault(node.input[0], []).append(node)
    names = {node.output[0] for nodes in products.values() for node in nodes}
    steps = [Step([])]
    for node in model.graph.node:
        if node.output[0] not in names:
            steps[-1].nodes.append(node)
        elif node is products[node.input[0]][0]:
            steps += [Step(products[node.input[0]], node.input[0]), Step([])]
    return [step for step in steps if step.nodes]


def _int8_nodes(
    step: Step, matrices: Mapping[str, Float32Array], sites: Mapping[str, Int8Site]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes of a step, in INT8 where they can be, and the constants that these have made."""
    builder = GraphBuilder({})
    made: dict[str, str] = {}
    if step.site in sites:
        builder.scope(step.site)
        made = append_site(builder, step.site, sites[step.site], step.site)
    for node in step.nodes:
        name = node.output[0]
        if node.op_type == "Gather" and node.input[0] in matrices and node.input[1] == "input_ids":
            builder.scope(name)
            made[name] = append_rows(builder, name, *quantize_rows(matrices[node.input[0]]), node.input[1])
        # The name that others read it by; onnxruntime takes such nodes out.
        builder.include([helper.make_node("Identity", [made[name]], [name]) if name in made else node], [])
    return builder.nodes, list(builder.initializers.values())


def _matrices(model: onnx.ModelProto) -> dict[str, Float32Array]:
    """The constant FP32 matrices."""
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
    }


def _equal_lengths(input_ids: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Batches of texts of one length, so that nothing is padded."""
    for length in sorted({len(ids) for ids in input_ids}):
        texts = [ids for ids in input_ids if len(ids) == length]
        size = max(1, _BATCH_TOKENS // length)
        yield from (texts[start : start + size] for start in range(0, len(texts), size))
