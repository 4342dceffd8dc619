"""The bound: the matrix products of a bundle's graph, with its own weights, and nothing else."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

_PRODUCTS = {"MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm", "Gemm", "MatMul"}


class Engine:
    """Every linear layer of the graph on inputs of its shape; outputs are dropped but for one row.

    What an engine does besides (attention, normalisation, quantising, moving, tokenising) is not in it, so nothing that
    runs these layers in onnxruntime can be faster.
    """

    PACKAGES = ("onnxruntime", "onnx", "numpy")

    def __init__(self, checkpoint: Path, folder: Path, threads: int, precision: str, brief: bool = False) -> None:
        from m3e.bundle import Bundle
        from m3e.cpu import cpu_features

        bundle = Bundle(folder / "bundle")
        self._threads = threads
        self._model = products_only(bundle.read(bundle.graph(precision, "cpu", cpu_features()).file))
        self._sessions: dict[tuple[int, int], list[Any]] = {}

    def run(self, tokens: int, batch_tokens: int, workers: int) -> dict[str, Any]:
        """Time the products of ``tokens`` tokens.

        Args:
            tokens: In all, rounded up to whole batches.
            batch_tokens: Rows of one product.
            workers: Sessions side by side; they share the threads.
        """
        sessions = self._open(workers)
        rng = np.random.default_rng(0)
        types = {"tensor(uint8)": np.uint8, "tensor(int8)": np.int8}
        feed = {}
        for value in sessions[0].get_inputs():
            size = (batch_tokens, value.shape[1])
            kind = types.get(value.type)
            feed[value.name] = (
                rng.standard_normal(size, dtype=np.float32) if kind is None else rng.integers(0, 100, size).astype(kind)
            )
        batches = -(-tokens // batch_tokens)

        def work(worker: int) -> None:
            for _ in range(worker, batches, workers):
                sessions[worker].run(None, feed)

        for session in sessions:
            session.run(None, feed)  # the first run allocates
        with ThreadPoolExecutor(workers) as pool:
            begin = time.perf_counter()
            list(pool.map(work, range(workers)))
            seconds = time.perf_counter() - begin
        return {"seconds": seconds, "tokens": batches * batch_tokens}

    def _open(self, workers: int) -> list[Any]:
        import onnxruntime

        threads = max(1, self._threads // workers)
        if (workers, threads) not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            self._sessions[workers, threads] = [
                onnxruntime.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])
                for _ in range(workers)
            ]
        return self._sessions[workers, threads]


def products_only(model: bytes) -> bytes:
    """Keep a graph's products with constant weights (K, N), each fed a graph input (rows, K) of its own type."""
    import onnx
    from onnx import TensorProto, helper

    source = onnx.load_from_string(model)
    constants = {tensor.name: tensor for tensor in source.graph.initializer}
    nodes: list[Any] = []
    inputs: dict[str, Any] = {}
    outputs: list[Any] = []
    used: set[str] = set()
    for node in source.graph.node:
        weight_at = 3 if node.op_type in ("QLinearMatMul", "QGemm") else 1
        weight = constants.get(node.input[weight_at]) if len(node.input) > weight_at else None
        if node.op_type not in _PRODUCTS or weight is None or len(weight.dims) != 2:
            continue
        kind = TensorProto.FLOAT if weight.data_type == TensorProto.FLOAT else TensorProto.UINT8
        name = f"x_{weight.dims[0]}_{kind}"
        inputs[name] = helper.make_tensor_value_info(name, kind, ["rows", weight.dims[0]])
        product = onnx.NodeProto()
        product.CopyFrom(node)
        product.input[0] = name
        unknown = [given for given in product.input[1:] if given and given not in constants]
        if unknown:
            raise ValueError(f"the product {node.name!r} takes {unknown}, which are no constants")
        used |= set(product.input[1:])
        row = f"row_{len(outputs)}"
        nodes += [product, helper.make_node("Slice", [node.output[0], "first", "last"], [row])]
        outputs.append(helper.make_tensor_value_info(row, TensorProto.FLOAT, None))
    if not nodes:
        raise ValueError("the graph has no product with constant weights")
    edges = [helper.make_tensor(name, TensorProto.INT64, [1], [i]) for i, name in enumerate(("first", "last"))]
    kept = [tensor for name, tensor in constants.items() if name in used]
    graph = helper.make_graph(nodes, "products", list(inputs.values()), outputs, [*kept, *edges])
    result: bytes = helper.make_model(
        graph, opset_imports=source.opset_import, ir_version=source.ir_version
    ).SerializeToString()
    return result
