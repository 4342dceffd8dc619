"""The programs of docs/interop.md with the real tools, each in an environment of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from m3e import Encoder
from m3e.vectors import Float32Array
from m3e_export.pipeline import convert
from tests.environments import ROOT, TRANSFORMERS_4, node_with, python_with, run_node, run_python

PYTHON = {
    "onnxruntime": ("onnxruntime>=1.23", "tokenizers>=0.21"),
    "fastembed": ("fastembed==0.9.1",),
    "sentence-transformers": TRANSFORMERS_4,
    "optimum": TRANSFORMERS_4,
}
NODE = ("@huggingface/transformers@4.3.1", "onnxruntime-web@1.31.0-dev.20260914-8d85527a0")
TRUNCATED = "word " * 700
# Lengths from two tokens to beyond the limit: padding and truncation must be the tools' own doing.
TEXTS = [
    "今天天气真好",
    "How do I reset my password?",
    "",
    "a",
    "ＡＢＣ１２３ 𠮷野家 🍜",
    "长" * 40,
    "word " * 700,
    "[MASK] x\u0301",
]


def blocks() -> dict[str, str]:
    """Each tool's program by the heading above it."""
    sections = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8").split("\n## ")[1:]
    programs = {section.partition("\n")[0]: re.search(r"```(?:python|js)\n(.*?)```", section, re.DOTALL)
                for section in sections}  # fmt: skip
    return {tool: match[1] for tool, match in programs.items() if match}


def program(tool: str) -> str:
    """The page's program on this module's texts."""
    texts = json.dumps(TEXTS, ensure_ascii=False)
    code, n = re.subn(r"(?m)^((?:const )?texts) = .*$", lambda match: f"{match[1]} = {texts}", blocks()[tool])
    assert n == 1
    return code


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for all of them, under the name that the programs use."""
    folder = tmp_path_factory.mktemp("interop")
    convert(str(tiny_checkpoint), folder / "bundles" / "m3e-base", precisions=("fp32", "int8"),
            with_token_embeddings=True, accept_accuracy=True)  # fmt: skip
    return folder / "bundles" / "m3e-base"


@pytest.fixture(scope="module")
def expected(bundle: Path) -> Float32Array:
    return Encoder(bundle, precision="fp32").encode(TEXTS)


@pytest.mark.interop
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")
@pytest.mark.parametrize("tool", PYTHON)
def test_python_tools_give_the_same_vectors(tool: str, bundle: Path, expected: Float32Array, tmp_path: Path) -> None:
    target = tmp_path / "vectors.npy"
    code = program(tool).replace("dim=768", "dim=64")
    code += f"\nimport numpy\nnumpy.save({str(target)!r}, numpy.asarray(vectors, dtype=numpy.float32))\n"
    run_python(python_with(*PYTHON[tool]), code, bundle.parents[1])
    np.testing.assert_allclose(np.load(target), expected, rtol=0, atol=2e-6)


@pytest.mark.interop
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")
@pytest.mark.parametrize(
    ("tool", "precision"), [("transformers.js", "fp32"), ("onnxruntime-web", "fp32"), ("onnxruntime-web", "int8")]
)
def test_node_tools_give_the_same_vectors(
    tool: str, precision: str, bundle: Path, expected: Float32Array, tmp_path: Path
) -> None:
    target, code = tmp_path / "vectors.json", program(tool)
    if precision == "int8":
        encoder = Encoder(bundle, precision="int8")
        (file,) = (graph.file for graph in encoder.manifest.graphs if graph.precision == "int8")
        code = code.replace("onnx/model.onnx", file)  # named after the processor that it is for
        expected = encoder.encode(TEXTS)
    code += f"\nimport fs from 'node:fs';\nfs.writeFileSync({json.dumps(str(target))}, JSON.stringify(vectors));\n"
    run_node(node_with(*NODE), code, bundle.parents[1])
    vectors = np.array(json.loads(target.read_text()), dtype=np.float32)
    kept = [i for i, text in enumerate(TEXTS) if text != TRUNCATED]
    if precision == "fp32":
        np.testing.assert_allclose(vectors[kept], expected[kept], rtol=0, atol=2e-6)
        # Its tokenizer cuts the closing [SEP] off, as the page says; once it does not, the page must be changed.
        assert np.abs(vectors - expected).max() > 1e-4
    else:
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
        assert (np.einsum("nd,nd->n", vectors, expected) / norms)[kept].min() > 0.9999


@pytest.mark.interop
@pytest.mark.timeout(900)
@pytest.mark.parametrize("tool", ["sentence-transformers", "optimum"])
def test_without_token_embeddings_they_stop_as_the_page_says(tool: str, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "m3e-base").symlink_to(tiny_bundle)
    with pytest.raises(AssertionError, match="KeyError: 'last_hidden_state'"):
        run_python(python_with(*PYTHON[tool]), program(tool), tmp_path)


@pytest.mark.checkout
def test_the_page_has_a_program_for_every_tool_and_the_tests_run_each() -> None:
    assert set(blocks()) == {*PYTHON, "transformers.js", "onnxruntime-web"}
    table = re.findall(r"(?m)^\| ([\w. -]+?)[ ,(]", (ROOT / "docs" / "interop.md").read_text(encoding="utf-8"))
    assert {*blocks(), "text-embeddings-inference"} <= set(table)


def test_text_embeddings_inference_can_read_the_folder(tiny_bundle: Path) -> None:
    """Its rules (huggingface/text-embeddings-inference: router/src/lib.rs and backends/ort/src/lib.rs)."""
    config = json.loads((tiny_bundle / "config.json").read_text(encoding="utf-8"))
    assert isinstance(config["architectures"], list)  # struct ModelConfig
    assert not any(name.endswith("Classification") for name in config["architectures"])
    assert isinstance(config["model_type"], str)
    for name in ("max_position_embeddings", "pad_token_id", "hidden_size", "num_hidden_layers"):
        assert type(config[name]) is int
    pooling = json.loads((tiny_bundle / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    names = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"]  # struct PoolConfig: all four
    assert [pooling[f"pooling_mode_{name}"] for name in names] == [False, True, False, False]
    own = json.loads((tiny_bundle / "sentence_bert_config.json").read_text(encoding="utf-8"))
    assert own["max_seq_length"] == 512  # struct STConfig
    assert json.loads((tiny_bundle / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"] == "WordPiece"
    assert not (tiny_bundle / "model.onnx").exists()  # it would be taken first
    graph = onnx.load(str(tiny_bundle / "onnx" / "model.onnx")).graph
    inputs = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert inputs.keys() <= {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
    assert set(inputs.values()) == {onnx.TensorProto.INT64}
    outputs = {value.name: value.type.tensor_type for value in graph.output}
    assert outputs["sentence_embedding"].elem_type == onnx.TensorProto.FLOAT
    assert len(outputs["sentence_embedding"].shape.dim) == 2
