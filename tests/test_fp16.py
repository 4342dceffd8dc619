from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from benchmarks.checkpoints import write_checkpoint
from m3e import BundleError, Encoder, ExportError
from m3e.backends import choose_graph
from m3e.bundle import Bundle
from m3e.feeds import Feeds, pack, pad, rectangle
from m3e.tokenizer import Tokenizer
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.emulate import emulate
from m3e_export.encoder_math import attention
from m3e_export.fp16 import choose_fp32_sites, fold_biases, sites_of
from m3e_export.graph import build_graph
from m3e_export.graph_cuda import build_cuda_graph
from m3e_export.graph_tensorrt import build_tensorrt_graph, build_watched
from m3e_export.graphs import check_kind, choose_kinds
from m3e_export.modules import Normalize
from m3e_export.pipeline import convert
from m3e_export.quantize import calibration_ids, quantize
from m3e_export.reference import reference_embeddings
from m3e_export.sources import fetch_checkpoint
from tests.agreement import ARCHITECTURES, POOLINGS, TEXTS, UNIEM, load, sites

Array = np.ndarray[Any, Any]
# What FP16 may cost: cosine, and a component of unit vectors.
MIN_COSINE, MAX_DIFFERENCE = 0.9999, 2e-3
BUILDERS: dict[str, tuple[Callable[..., onnx.ModelProto], Callable[..., Feeds]]] = {
    "cuda": (lambda *given: emulate(build_cuda_graph(*given)), pack),
    "tensorrt": (lambda *given: emulate(build_tensorrt_graph(*given)), rectangle),
}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(fetch_checkpoint(str(tiny_checkpoint)))


@pytest.fixture(scope="module")
def ids(checkpoint: Checkpoint, sentences: list[str]) -> list[list[int]]:
    """Real texts in both languages, short and long."""
    return calibration_ids(checkpoint, [text for text in sentences if len(text) < 200][::40])[:24]


def run(model: onnx.ModelProto, feed: Callable[..., Feeds], ids: Sequence[Sequence[int]]) -> Array:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    vectors: Array = np.concatenate([session.run(None, feed(ids[k : k + 6]))[0] for k in range(0, len(ids), 6)])
    return vectors


def distance(vectors: Array, exact: Array) -> tuple[float, float]:
    """Lowest cosine and largest difference of a component of unit vectors; zero and infinity where not finite."""
    if not np.isfinite(vectors).all():
        return 0.0, np.inf
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (vectors.astype(float), exact.astype(float)))
    return float((a * b).sum(axis=1).min()), float(np.abs(a - b).max())


def is_close(vectors: Array, exact: Array) -> bool:
    cosine, difference = distance(vectors, exact)
    return cosine >= MIN_COSINE and difference <= MAX_DIFFERENCE


@pytest.mark.parametrize("target", BUILDERS)
def test_both_graphs_give_the_fp32_graphs_vectors(target: str, checkpoint: Checkpoint, ids: list[list[int]]) -> None:
    build, feed = BUILDERS[target]
    vectors = run(build(checkpoint), feed, ids)
    assert vectors.dtype == np.float32
    assert is_close(vectors, run(build_graph(checkpoint), pad, ids))


@pytest.mark.parametrize("target", BUILDERS)
@pytest.mark.parametrize("model", ["minilm", pytest.param("base", marks=pytest.mark.long)])
def test_a_trained_model_and_the_shape_of_m3e_base(
    target: str, model: str, minilm_checkpoint: Path, sentences: list[str], tmp_path: Path
) -> None:
    folder = minilm_checkpoint if model == "minilm" else write_checkpoint(tmp_path / "m3e-base", "base")
    loaded = load_checkpoint(fetch_checkpoint(str(folder)))
    texts = calibration_ids(loaded, [text for text in sentences if len(text) < 150][::60])[:12]
    assert not choose_fp32_sites(loaded, texts, build_watched)
    build, feed = BUILDERS[target]
    assert is_close(run(build(loaded), feed, texts), run(build_graph(loaded), pad, texts))


HOSTILE = {
    "inner activation": {"intermediate.dense.weight": 3e5},
    "weights": {"output.dense.weight": 3e7},
    "output of a layer": {"intermediate.dense.weight": 1e3, "layer.1.output.dense.weight": 1e5},
    "values": {"value.weight": 5e5},
    "bias of the values": {"value.bias": 1e7},
    "hidden state": {"LayerNorm.weight": 3e5},
    "embeddings": {"word_embeddings.weight": 1e7},
}


def hostile(checkpoint: Checkpoint, factors: dict[str, float]) -> Checkpoint:
    tensors = {
        name: (tensor * next((f for part, f in factors.items() if name.endswith(part)), 1.0)).astype(np.float32)
        for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("factors", HOSTILE.values(), ids=HOSTILE.keys())
def test_activations_beyond_fp16_stay_fp32(
    checkpoint: Checkpoint, ids: list[list[int]], factors: dict[str, float]
) -> None:
    changed = hostile(checkpoint, factors)
    exact = run(build_graph(changed), pad, ids[:6])
    outside = choose_fp32_sites(changed, ids, build_watched)
    assert outside
    assert set(outside) < set(sites_of(changed)) or "LayerNorm.weight" in factors
    for build, feed in BUILDERS.values():
        with np.errstate(over="ignore"):  # weights overflow as well
            unprotected = build(changed)
        assert not is_close(run(unprotected, feed, ids[:6]), exact), "the case is not hostile"
        assert is_close(run(build(changed, outside), feed, ids[:6]), exact)


def test_weights_below_fp16_stay_fp32(checkpoint: Checkpoint, ids: list[list[int]]) -> None:
    outside = choose_fp32_sites(hostile(checkpoint, {"output.dense.weight": 1e-6}), ids[:3], build_watched)
    assert {site for site in outside if site.endswith("output")} == {
        f"encoder.layer.{i}.{part}output" for i in range(2) for part in ("", "attention.")
    }


def test_everything_in_fp32_is_the_fp32_graph(checkpoint: Checkpoint, ids: list[list[int]]) -> None:
    exact = run(build_graph(checkpoint), pad, ids)
    for build, feed in BUILDERS.values():
        _, difference = distance(run(build(checkpoint, sites_of(checkpoint)), feed, ids), exact)
        assert difference < 1e-6


def test_folding_biases_changes_no_vector(checkpoint: Checkpoint, ids: list[list[int]]) -> None:
    biased = hostile(checkpoint, {"key.bias": 30.0, "value.bias": 30.0})
    folded = fold_biases(biased)
    assert not folded.tensors["encoder.layer.1.attention.self.key.bias"].any()
    exact, vectors = (run(build_graph(item), pad, ids[:6]) for item in (biased, folded))
    assert distance(vectors, exact)[1] < 1e-6


@pytest.mark.parametrize("target", BUILDERS)
def test_the_emulation_overflows_where_fp16_does(checkpoint: Checkpoint, ids: list[list[int]], target: str) -> None:
    """Not in the weights, which are below 65504: in the products."""
    changed = hostile(checkpoint, {"intermediate.dense.weight": 3e5})
    assert max(np.abs(tensor).max() for tensor in changed.tensors.values()) < 65504
    build, feed = BUILDERS[target]
    assert np.isfinite(run(build_graph(changed), pad, ids[:6])).all()
    assert not np.isfinite(run(build(changed), feed, ids[:6])).all()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "unit length"])
def test_poolings(checkpoint: Checkpoint, ids: list[list[int]], pooling: str, normalize: bool) -> None:
    changed = dataclasses.replace(checkpoint, pooling=(pooling,), head=(Normalize(),) * normalize)
    exact = np.stack(list(reference_embeddings(changed, ids[:6])))
    for build, feed in BUILDERS.values():
        vectors = run(build(changed), feed, ids[:6])
        assert vectors.shape == exact.shape
        assert is_close(vectors, exact)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(exact, axis=1), rtol=2e-3)


@pytest.mark.parametrize("target", BUILDERS)
@pytest.mark.parametrize("name", [*POOLINGS, *UNIEM])
def test_every_pooling_and_head(target: str, name: str) -> None:
    _, loaded = load("roberta", *POOLINGS.get(name, ([name], "")))
    agree(target, loaded)


@pytest.mark.parametrize("target", BUILDERS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(target: str, kind: str) -> None:
    _, loaded = load(kind, ["mean"])
    if (kind, target) == ("mpnet", "cuda"):
        with pytest.raises(ExportError, match="mpnet attends with relative positions"):
            check_kind(loaded, choose_kinds(["fp16"], [target], None)[0])
    else:
        agree(target, loaded)


TAKEN = json.loads((Path(__file__).parent / "data" / "tensorrt_operators.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [*((kind, "mean") for kind in ARCHITECTURES if kind != "bert"), *(("bert", name) for name in (*POOLINGS, *UNIEM))],
)
def test_tensorrt_takes_every_operator_with_its_type(kind: str, pooling: str) -> None:
    """An operator that its parser does not take would be left to the CPU, in the middle of the graph."""
    _, loaded = load(kind, *POOLINGS.get(pooling, ([pooling], "")))
    refused = set()
    for int8 in (None, sites(kind) if pooling == "mean" else None):
        model = onnx.shape_inference.infer_shapes(build_tensorrt_graph(loaded, (), int8), strict_mode=True)
        graph = model.graph
        types = {item.name: item.type.tensor_type.elem_type for item in [*graph.input, *graph.value_info]}
        types |= {item.name: item.data_type for item in graph.initializer}
        for node in graph.node:
            data = node.input[1] if node.op_type == "Where" else node.input[0]
            values = [data, *(node.output if node.op_type == "Cast" else ())]
            given = {onnx.TensorProto.DataType.Name(types[value]) for value in values if value in types}
            assert given, f"{node.op_type} {node.name} has a value whose type is not known"
            if not given <= set(TAKEN.get(node.op_type, ())):
                refused.add((node.op_type, *given))
    assert not refused


def agree(target: str, loaded: Checkpoint) -> None:
    """Compare with the FP32 graph on texts of all lengths; with all of it in FP32, to rounding."""
    ids = Tokenizer(loaded.tokenizer_json, loaded.max_seq_length)(TEXTS).input_ids
    build, feed = BUILDERS[target]
    exact = run(build_graph(loaded), pad, ids)
    assert is_close(run(build(loaded, choose_fp32_sites(loaded, ids, build_watched)), feed, ids), exact)
    assert distance(run(build(loaded, sites_of(loaded)), feed, ids), exact)[1] < 2e-6


@pytest.mark.parametrize("target", BUILDERS)
def test_prompts_that_are_not_pooled_are_refused(target: str) -> None:
    _, loaded = load("bert", ["mean"], include_prompt=False)
    with pytest.raises(ExportError, match=f"leaves its prompts out of the pooling, .* for {target} do not"):
        check_kind(loaded, choose_kinds(["fp16"], [target], None)[0])


@pytest.mark.parametrize("target", BUILDERS)
@pytest.mark.parametrize("hidden_act", ["gelu_new", "relu", "silu"])
def test_other_activations(checkpoint: Checkpoint, ids: list[list[int]], target: str, hidden_act: str) -> None:
    changed = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, hidden_act=hidden_act))
    build, feed = BUILDERS[target]
    assert is_close(run(build(changed), feed, ids[:6]), run(build_graph(changed), pad, ids[:6]))


def test_the_contract(checkpoint: Checkpoint) -> None:
    cuda, plain = build_cuda_graph(checkpoint), build_tensorrt_graph(checkpoint)
    for model in (cuda, plain):
        onnx.checker.check_model(model)
        assert (model.opset_import[0].version, model.ir_version) == (20, 10)
        (output,) = model.graph.output
        assert (output.name, output.type.tensor_type.elem_type) == ("sentence_embedding", onnx.TensorProto.FLOAT)
        assert {item.type.tensor_type.elem_type for item in model.graph.input} == {onnx.TensorProto.INT32}
        half = [item for item in model.graph.initializer if item.data_type == onnx.TensorProto.FLOAT16]
        assert len(half) >= 30
        # No mask of the size of FP16's or FP32's lowest number.
        floats = [onnx.numpy_helper.to_array(item) for item in model.graph.initializer if item.data_type == 1]
        assert max(float(np.abs(item).max()) for item in floats) <= 1e9
    assert [item.name for item in plain.graph.input] == ["input_ids", "lengths"]
    assert [(item.domain, item.version) for item in plain.opset_import] == [("", 20)]
    assert {node.domain for node in plain.graph.node} == {""}
    # Nothing asks for a shape, so nothing runs on the CPU and the run can be captured.
    assert not {"Shape", "NonZero", "Range", "ConstantOfShape"} & {node.op_type for node in cuda.graph.node}


def test_softmax_and_pooling_are_fp32(checkpoint: Checkpoint) -> None:
    inferred = onnx.shape_inference.infer_shapes(build_tensorrt_graph(checkpoint), strict_mode=True)
    types = {item.name: item.type.tensor_type.elem_type for item in inferred.graph.value_info}
    for node in inferred.graph.node:
        if node.op_type in ("Softmax", "ReduceSum", "Div", "Where"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT, node.name
        if node.op_type == "LayerNormalization":
            assert not [item for item in node.attribute if item.name == "stash_type"]  # 1, FP32, by default


def test_every_cuda_operator_is_as_onnxruntime_registers_it(checkpoint: Checkpoint) -> None:
    schemas = {item.name: item for item in get_all_operator_schema() if item.domain == "com.microsoft"}
    counts: Counter[str] = Counter()
    for node in build_cuda_graph(checkpoint).graph.node:
        if node.domain != "com.microsoft":
            continue
        schema = schemas[node.op_type]
        counts[node.op_type] += 1
        assert len(node.input) <= len(schema.inputs)
        for given, declared in zip(node.input, schema.inputs, strict=False):
            assert given or "Optional" in str(declared.option), (node.op_type, declared.name)
        assert {item.name for item in node.attribute} <= set(schema.attributes)
        constraint = {item.type_param_str: set(item.allowed_type_strs) for item in schema.type_constraints}
        assert "tensor(float16)" in constraint["T"]
        assert constraint.get("M", {"tensor(int32)"}) == {"tensor(int32)"}
    assert counts == {"PackedMultiHeadAttention": 2, "SkipLayerNormalization": 5, "BiasGelu": 2, "RestorePadding": 1}


class PackedMultiHeadAttention(OpRun):
    op_domain = "com.microsoft"

    def _run(self, q: Array, k: Array, v: Array, _: Any, offset: Array, ends: Array, num_heads: int) -> tuple[Array]:
        q32, k32, v32 = (part.astype(np.float32) for part in (q, k, v))
        texts = [slice(*pair) for pair in itertools.pairwise(ends)]
        out = [attention(q32[None, text], k32[None, text], v32[None, text], num_heads)[0] for text in texts]
        return (np.concatenate(out).astype(q.dtype),)


class SkipLayerNormalization(OpRun):
    op_domain = "com.microsoft"

    def _run(
        self, x: Array, skip: Array, scale: Array, shift: Array, bias: Any = None, epsilon: float = 0
    ) -> tuple[Array]:
        total = x.astype(np.float32) + skip + (0 if bias is None else bias.astype(np.float32))
        centred = total - total.mean(axis=-1, keepdims=True)
        normal = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + epsilon)
        return ((normal * scale + shift).astype(x.dtype),)


class BiasGelu(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x: Array, bias: Array) -> tuple[Array]:
        from math import erf

        total = x.astype(np.float64) + bias
        return ((total * (1 + np.vectorize(erf)(total / np.sqrt(2))) / 2).astype(x.dtype),)


class RestorePadding(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x: Array, offset: Array) -> tuple[Array]:
        cells = np.zeros((offset.size, x.shape[1]), x.dtype)
        cells[offset.ravel()[: len(x)]] = x
        return (cells.reshape(*offset.shape, -1),)


def test_the_very_file_in_onnxs_reference_evaluator(checkpoint: Checkpoint, ids: list[list[int]]) -> None:
    """Another reading of the operators than the emulation's: onnx's own evaluator, and numpy text by text."""
    kernels = [PackedMultiHeadAttention, SkipLayerNormalization, BiasGelu, RestorePadding]
    evaluator = ReferenceEvaluator(build_cuda_graph(checkpoint), new_ops=kernels)
    outputs: Any = evaluator.run(None, pack(ids[:6]))
    vectors = outputs[0]
    assert is_close(vectors, run(build_graph(checkpoint), pad, ids[:6]))
    assert distance(run(BUILDERS["cuda"][0](checkpoint), pack, ids[:6]), vectors)[1] < 5e-4


def test_int8_for_tensorrt_is_symmetric_and_per_channel(checkpoint: Checkpoint, ids: list[list[int]]) -> None:
    sites = quantize(checkpoint)
    model = build_tensorrt_graph(checkpoint, (), sites)
    tensors = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    counts = Counter(node.op_type for node in model.graph.node)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (8, 20)  # inputs; inputs and weights
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero_point = (tensors[name] for name in node.input[1:])
            assert scale.dtype == np.float16
            assert zero_point.dtype == np.int8
            assert not zero_point.any()
    cosine, _ = distance(run(model, rectangle, ids), run(build_graph(checkpoint), pad, ids))
    assert cosine > 0.999
    # Of attention's two sites neither is quantised without the other, which is fitted to it.
    for kept, n_left in (("output", 7), ("attention.self", 6), ("attention.output", 6)):
        mixed = build_tensorrt_graph(checkpoint, [f"encoder.layer.0.{kept}"], sites)
        assert Counter(node.op_type for node in mixed.graph.node)["QuantizeLinear"] == n_left


def test_the_bundle_says_what_it_holds(gpu_bundle: Path) -> None:
    opened = Bundle(gpu_bundle)
    graphs = {(graph.precision, graph.target): graph for graph in opened.manifest.graphs}
    assert {pair: graph.file for pair, graph in graphs.items()} == {
        ("fp32", "cpu"): "onnx/model.onnx",
        ("fp16", "cuda"): "onnx/model_fp16.onnx",
        ("fp16", "tensorrt"): "onnx/model_fp16_plain.onnx",
    }
    for target in ("cuda", "tensorrt"):
        graph = graphs["fp16", target]
        assert graph.certificate is not None
        assert graph.certificate.min_cosine >= 1 - graph.certificate.tolerance == MIN_COSINE
        assert not graph.batch_invariant
        assert graph.fp32_sites == ()
        assert choose_graph(opened, "auto", target) == graph
    assert choose_graph(opened, "fp32", "cuda").file == "onnx/model.onnx"
    assert Encoder(gpu_bundle).precision == "fp32"


def test_sites_in_fp32_stand_in_the_manifest(tmp_path: Path) -> None:
    import safetensors.numpy

    folder = write_checkpoint(tmp_path / "hostile")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.intermediate.dense.weight"] *= 3e6
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    manifest = convert(str(folder), tmp_path / "bundle", precisions=("fp16",), targets=("cuda",))
    (graph,) = manifest.graphs
    assert graph.fp32_sites == ("encoder.layer.1.intermediate", "encoder.layer.1.output")
    assert graph.certificate is not None
    assert graph.certificate.min_cosine >= MIN_COSINE


@pytest.mark.parametrize(
    ("precisions", "targets", "expected"),
    [
        (["fp32"], ["cpu"], [("fp32", "cpu")]),
        (["fp16"], ["cuda", "tensorrt"], [("fp16", "cuda"), ("fp16", "tensorrt")]),
        (["int8"], ["tensorrt"], [("int8", "tensorrt")]),
        (["fp32", "fp16"], ["cpu"], "precision fp16 is left without a graph"),
        (["fp32"], ["cpu", "cuda"], "target cuda is left without a graph"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_precisions_and_targets(precisions: list[str], targets: list[str], expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(ExportError, match=expected):
            choose_kinds(precisions, targets, None)
    else:
        assert [(kind.precision, kind.target) for kind in choose_kinds(precisions, targets, None)] == expected


@pytest.mark.parametrize(("precision", "device", "message"), [
    ("auto", "tensorrt", "no fp16 graph for tensorrt.*convert again with '--precision fp16 --target tensorrt'"),
    ("fp16", "cpu", "no fp16 graph for cpu"),
    ("int8", "cuda", "no int8 graph for cuda"),
])  # fmt: skip
def test_a_graph_that_is_not_there(tiny_bundle: Path, precision: str, device: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        choose_graph(Bundle(tiny_bundle), precision, device)
