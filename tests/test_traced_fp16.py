"""A traced encoder in FP16, against itself in FP32: which of its nodes are, and what the others protect."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from m3e import ExportError, InferenceError
from m3e.feeds import rectangle
from m3e.session import Session
from m3e_export.builder import RECTANGLE, GraphBuilder, reads
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.emulate import emulated_session
from m3e_export.graphs import choose_kinds
from m3e_export.modules import Normalize
from m3e_export.optimum_frontend import build_traced_gpu_graph, build_traced_graph
from m3e_export.sources import fetch_checkpoint
from m3e_export.traced_fp16 import choose_fp32_nodes, to_fp16

Array = np.ndarray[Any, Any]
WORDS, WIDTH, INNER = 300, 32, 64
MIN_COSINE = 0.9999
PREFIX = "encoder/"  # as the frontend has it
FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, WORDS, length).tolist() for length in (3, 5, 8, 13, 20, 1, 40, 200, 64)]
SHAPES = {"words": (WORDS, WIDTH), "query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH),
          "wide": (WIDTH, INNER), "narrow": (INNER, WIDTH), "distances": (8, 1)}  # fmt: skip
WEIGHTS = SHAPES.keys() - {"distances"}  # a column may be counted with, as rotation's frequencies are


def make_encoder(scales: dict[str, float] | None = None) -> onnx.ModelProto:
    """An encoder as a tracer leaves one: one head with buckets of distances, and a feed-forward block.

    Args:
        scales: Factors for matrices.
    """
    rng = np.random.default_rng(1)
    b = GraphBuilder({"input_ids": RECTANGLE, "attention_mask": RECTANGLE})
    w = {}
    for name, shape in SHAPES.items():
        matrix = rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[0] ** 0.5)
        w[name] = b.const(name, matrix * np.float32((scales or {}).get(name, 1)))
    one, shift = b.const("one", np.ones(WIDTH, np.float32)), b.const("shift", np.full(WIDTH, 1e-4, np.float32))
    bias = b.const("bias", np.full(INNER, 1e-4, np.float32))
    words = b.op("Gather", w["words"], "input_ids")
    x = b.op("LayerNormalization", words, one, shift, axis=-1, epsilon=1e-5)
    # Buckets of distances, counted in floats as deberta-v2 does: the steps of FP16 above 2048 are 2.
    seq_len = b.op("Gather", b.op("Shape", x), b.const("axis", 1, np.int64))
    place = b.op("Range", b.const("zero", 0, np.int64), seq_len, b.const("step", 1, np.int64))
    place = b.op("Mul", b.op("Cast", place, to=FLOAT), b.const("many", 4097, np.float32))
    distance = b.op("Sub", b.op("Unsqueeze", place, b.int64(0)), b.op("Unsqueeze", place, b.int64(1)))
    bucket = b.op(
        "Mod", b.op("Cast", b.op("Abs", distance), to=onnx.TensorProto.INT64), b.const("buckets", 8, np.int64)
    )
    relative = b.op("Squeeze", b.op("Gather", w["distances"], bucket), b.int64(2))
    mask = b.op("Sub", b.const("float_one", 1, np.float32), b.op("Cast", "attention_mask", to=FLOAT))
    mask = b.op("Mul", b.op("Unsqueeze", mask, b.int64(1)), b.const("lowest", np.finfo(np.float32).min, np.float32))
    q, k, v = (b.op("MatMul", x, w[name]) for name in ("query", "key", "value"))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1]))
    scores = b.op("Add", b.op("Add", scores, relative), mask)
    context = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    x = b.op("LayerNormalization", b.op("Add", x, context), one, shift, axis=-1, epsilon=1e-5)
    inner = b.op("Gelu", b.op("Add", b.op("MatMul", x, w["wide"]), bias))
    total = b.op("Add", x, b.op("MatMul", inner, w["narrow"]))
    # Either way of an If reads a value from outside.
    always = b.op("Greater", seq_len, b.const("minus_one", -1, np.int64))
    total = b.choose(always, lambda: b.op("Identity", total), lambda: b.op("Neg", total))
    out = b.op("LayerNormalization", total, one, shift, axis=-1, epsilon=1e-5)
    model = b.finish({"hidden": (out, ["batch", "seq_len", WIDTH])})
    return onnx.compose.add_prefix(model, PREFIX, rename_inputs=False)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    """Only what the pooling asks of it belongs to the encoder."""
    loaded = load_checkpoint(fetch_checkpoint(str(tiny_checkpoint)))
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, hidden_size=WIDTH), head=())


def exact_vectors(encoder: onnx.ModelProto, checkpoint: Checkpoint) -> Array:
    return Session(build_traced_graph(encoder, checkpoint).SerializeToString(), num_threads=1).run(TEXTS)


def half_graph(encoder: onnx.ModelProto, checkpoint: Checkpoint, fp32_nodes: Collection[str]) -> onnx.ModelProto:
    with np.errstate(over="ignore"):  # weights overflow as well
        return build_traced_gpu_graph(to_fp16(encoder, fp32_nodes), checkpoint)


def half_vectors(encoder: onnx.ModelProto, checkpoint: Checkpoint, fp32_nodes: Collection[str]) -> Array:
    return emulated_session(half_graph(encoder, checkpoint, fp32_nodes).SerializeToString()).run(TEXTS)


def cosine(vectors: Array, exact: Array) -> float:
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(exact, axis=1)
    return float(((vectors * exact).sum(axis=1) / norms).min())


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, check_type=True).graph
    return {item.name: item.type.tensor_type.elem_type for item in (*graph.value_info, *graph.output)}


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("head", [(), (Normalize(),)], ids=["plain", "unit length"])
def test_it_gives_the_fp32_graphs_vectors(checkpoint: Checkpoint, pooling: str, head: Any) -> None:
    changed, encoder = dataclasses.replace(checkpoint, pooling=(pooling,), head=head), make_encoder()
    assert not choose_fp32_nodes(encoder, TEXTS)
    vectors, exact = half_vectors(encoder, changed, ()), exact_vectors(encoder, changed)
    assert vectors.dtype == np.float32
    assert cosine(vectors, exact) >= MIN_COSINE
    assert np.abs(vectors - exact).max() > 1e-5  # it is rounded, after all
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(exact, axis=1), rtol=2e-3)


def test_everything_in_fp32_is_the_fp32_graph(checkpoint: Checkpoint) -> None:
    encoder = make_encoder()
    vectors = half_vectors(encoder, checkpoint, [node.output[0] for node in encoder.graph.node])
    np.testing.assert_allclose(vectors, exact_vectors(encoder, checkpoint), rtol=0, atol=1e-6)


def test_the_very_file_in_onnxs_reference_evaluator(checkpoint: Checkpoint) -> None:
    """Another reading of FP16 than the emulation's: numpy's."""
    model = half_graph(make_encoder(), checkpoint, ())
    outputs: Any = ReferenceEvaluator(model).run(None, rectangle(TEXTS))
    vectors = half_vectors(make_encoder(), checkpoint, ())
    assert cosine(outputs[0], vectors) >= MIN_COSINE
    np.testing.assert_allclose(outputs[0], vectors, rtol=0, atol=5e-3)


def test_the_contract(checkpoint: Checkpoint) -> None:
    model = half_graph(make_encoder(), dataclasses.replace(checkpoint, head=(Normalize(),)), ())
    types = element_types(model)
    assert [(item.name, item.type.tensor_type.elem_type) for item in model.graph.input] == [
        ("input_ids", onnx.TensorProto.INT32), ("lengths", onnx.TensorProto.INT32),
    ]  # fmt: skip
    assert {item.name: item.type.tensor_type.elem_type for item in model.graph.output} == {"sentence_embedding": FLOAT}
    assert {item.domain for item in model.opset_import} == {""}
    made: dict[str, Counter[int]] = defaultdict(Counter)
    for node in model.graph.node:
        made[node.op_type][types.get(node.output[0], 0)] += 1
    assert made["MatMul"] == {FLOAT16: 7}
    assert made["LayerNormalization"] == {FLOAT16: 3}
    assert made["Gelu"] == {FLOAT16: 1}
    for name in ("Softmax", "ReduceSum", "ReduceL2", "Abs", "If"):
        assert set(made[name]) == {FLOAT}, name
    # The distances' factor and difference; the mask's; the pooling's.
    assert made["Sub"][FLOAT16] == made["Div"][FLOAT16] == 0
    half = [item for item in model.graph.initializer if item.data_type == FLOAT16]
    assert max(float(np.abs(numpy_helper.to_array(item)).max()) for item in half) < 100
    assert {item.name for item in half} >= {f"{PREFIX}{name}/fp16" for name in WEIGHTS}
    read = set(reads(model.graph.node))
    assert {item.name for item in model.graph.initializer} <= read  # no weights twice
    assert not read & {PREFIX + name for name in WEIGHTS}


HOSTILE = {
    "inner activation": {"wide": 1e5},
    "weights": {"narrow": 1e7},
    "output of the block": {"wide": 1e3, "narrow": 1e4},
    "values": {"value": 5e5},
    "embeddings": {"words": 1e7},
}


@pytest.mark.parametrize("scales", HOSTILE.values(), ids=HOSTILE.keys())
def test_values_beyond_fp16_stay_fp32(checkpoint: Checkpoint, scales: dict[str, float]) -> None:
    encoder = make_encoder(scales)
    exact, outside = exact_vectors(encoder, checkpoint), choose_fp32_nodes(encoder, TEXTS)
    assert max(outside.values()) > 65504 / 8
    try:
        unprotected = cosine(half_vectors(encoder, checkpoint, ()), exact)
    except InferenceError:
        unprotected = 0
    assert unprotected < MIN_COSINE, "the case is not hostile"
    assert cosine(half_vectors(encoder, checkpoint, outside), exact) >= MIN_COSINE
    products = {node.output[0] for node in encoder.graph.node if node.op_type == "MatMul"}
    assert len(products - outside.keys()) >= 3, "what is not concerned stays FP16"


def test_weights_below_fp16_stay_fp32(checkpoint: Checkpoint) -> None:
    encoder = make_encoder({"narrow": 1e-6})
    outside = choose_fp32_nodes(encoder, TEXTS)
    (product,) = (node for node in encoder.graph.node if f"{PREFIX}narrow" in node.input)
    assert outside[product.output[0]] < 2**-10
    assert cosine(half_vectors(encoder, checkpoint, outside), exact_vectors(encoder, checkpoint)) >= MIN_COSINE


def test_a_mask_that_no_text_has_shown_stays_fp32(checkpoint: Checkpoint) -> None:
    encoder = make_encoder()
    outside = choose_fp32_nodes(encoder, [TEXTS[4]] * 3)  # nothing is padded, and nothing masked
    assert cosine(half_vectors(encoder, checkpoint, outside), exact_vectors(encoder, checkpoint)) >= MIN_COSINE
    types = element_types(to_fp16(encoder, outside))
    softmax = next(node for node in encoder.graph.node if node.op_type == "Softmax")
    assert types[softmax.input[0]] == FLOAT


def test_a_value_of_a_pad_counts_too(checkpoint: Checkpoint) -> None:
    """Token 0 is what pads carry; its huge row is seen although no text has it."""
    encoder = make_encoder()
    (words,) = (tensor for tensor in encoder.graph.initializer if tensor.name == f"{PREFIX}words")
    rows = numpy_helper.to_array(words).copy()
    rows[0] *= 1e6
    words.CopyFrom(numpy_helper.from_array(rows, words.name))
    texts = [[token or 1 for token in ids] for ids in TEXTS]
    (gather,) = (node for node in encoder.graph.node if words.name in node.input)
    assert choose_fp32_nodes(encoder, texts)[gather.output[0]] > 65504


def test_a_text_does_not_depend_on_its_neighbours(checkpoint: Checkpoint) -> None:
    session = emulated_session(half_graph(make_encoder(), checkpoint, ()).SerializeToString())
    alone = np.concatenate([session.run([ids]) for ids in TEXTS])
    np.testing.assert_allclose(session.run(TEXTS), alone, rtol=0, atol=2e-3)


def test_int8_for_tensorrt_is_left_without_a_graph() -> None:
    expected = r"precision int8 .* with --frontend optimum fp32 for cpu, int8 for cpu, fp16 for cuda, fp16 for tensorrt"
    with pytest.raises(ExportError, match=expected):
        choose_kinds(["int8"], ["tensorrt"], None, traced=True)
    kinds = choose_kinds(["int8", "fp16"], ["cpu", "tensorrt"], None, traced=True)
    assert [(kind.precision, kind.target) for kind in kinds] == [("int8", "cpu"), ("fp16", "tensorrt")]
