"""Encoders that the builder does not know, through optimum in an environment of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.checkpoints import write_checkpoint, write_json
from m3e import CheckpointError, DependencyError, Encoder
from m3e.bundle import Bundle
from m3e_export.optimum_frontend import read_config
from m3e_export.pipeline import convert
from tests.environments import TRANSFORMERS_4, python_with, run_python
from tests.gpu_standin import StandInSession, standin
from tests.test_interop import TEXTS

__all__ = ["standin"]

SHAPE = {"vocab_size": 21128, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128,
         "num_hidden_layers": 3, "max_position_embeddings": 512}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 64,
                   "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0},
    "modernbert": {"local_attention": 32, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2,
                   "eos_token_id": 3},
}  # fmt: skip
# Values that linear layers read, in three layers: what attention, its output, and either half of a feed-forward block
# read; and the relative positions of deberta-v2.
N_SITES = {"deberta-v2": 3 * 5, "modernbert": 3 * 4, "bert": 3 * 4}
# What the first matrix of a feed-forward block is called; scaled so that what it makes passes 65504.
WIDE = {"deberta-v2": "layer.1.intermediate.dense.weight", "modernbert": "layers.1.mlp.Wi.weight",
        "bert": "layer.1.intermediate.dense.weight"}  # fmt: skip
# Makes the checkpoint and converts it; then transformers and torch embed each text by itself. After that, a checkpoint
# with activations beyond FP16, with and without what keeps these in FP32.
PROGRAM = """
import functools, json, shutil
from pathlib import Path
import numpy, torch
from transformers import AutoConfig, AutoModel, AutoTokenizer
from m3e import InferenceError
from m3e_export import optimum_frontend, pipeline
from m3e_export.pipeline import convert

kind, shape, wide, texts = json.loads({arguments!r})
torch.manual_seed(0)
model = AutoModel.from_config(AutoConfig.for_model(kind, **shape)).eval()
model.save_pretrained("checkpoint")
convert("checkpoint", Path("bundle"), frontend="optimum", precisions=("fp32", "int8", "fp16"),
        targets=("cpu", "cuda", "tensorrt"), with_token_embeddings=True)
tokenizer = AutoTokenizer.from_pretrained("checkpoint")
vectors = []
with torch.inference_mode():
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        hidden = model(**inputs).last_hidden_state[0]
        vectors.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
numpy.save("vectors.npy", numpy.stack(vectors))

with torch.no_grad():
    (matrix,) = (tensor for name, tensor in model.named_parameters() if name.endswith(wide))
    matrix *= 3e5
shutil.copytree("checkpoint", "hostile")
model.save_pretrained("hostile")
optimum_frontend._trace = functools.cache(optimum_frontend._trace)
to_fp16 = functools.partial(convert, "hostile", frontend="optimum", precisions=["fp16"], targets=["cuda"])
to_fp16(Path("hostile-bundle"))
pipeline.choose_fp32_nodes = lambda *_: {{}}
try:
    to_fp16(Path("unprotected"))
except InferenceError:
    pass
else:
    raise SystemExit("the checkpoint is not hostile")
"""


@pytest.mark.interop
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")
@pytest.mark.parametrize("kind", ["deberta-v2", "modernbert", "bert"])
def test_a_traced_encoder_gives_transformers_vectors(kind: str, standin: list[StandInSession], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", normalize=True)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    arguments = json.dumps([kind, SHAPE | ARCHITECTURES.get(kind, {}), WIDE[kind], TEXTS], ensure_ascii=False)
    run_python(python_with(*TRANSFORMERS_4), PROGRAM.format(arguments=arguments), tmp_path)
    encoder, expected = Encoder(tmp_path / "bundle", precision="fp32"), np.load(tmp_path / "vectors.npy")
    assert encoder.manifest.model.architecture == kind
    graphs = {graph.file: graph for graph in encoder.manifest.graphs}
    assert [(graph.precision, graph.target) for graph in graphs.values()] == [
        ("fp32", "cpu"), ("int8", "cpu"), ("fp16", "cuda"), ("fp16", "tensorrt"),
    ]  # fmt: skip
    for graph in graphs.values():
        on_gpu = graph.target != "cpu"
        assert graph.outputs == ("sentence_embedding", *(["last_hidden_state"] if not on_gpu else []))
        assert not graph.batch_invariant
        assert graph.certificate is not None
        # Neighbours may change the order of sums, and so an 8-bit level here and there, but no scale.
        assert graph.certificate.max_batch_difference <= {"fp32": 1e-6, "int8": 5e-4, "fp16": 2e-3}[graph.precision]
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, rtol=0, atol=2e-6)
    _, int8, *fp16 = graphs.values()
    assert len(int8.int8_sites) == N_SITES[kind]
    encoder = Encoder(tmp_path / "bundle", precision="int8")
    assert not encoder.mixes_widths  # its attention is in floating point
    vectors = encoder.encode(TEXTS)
    assert (vectors * expected).sum(axis=1).min() > 0.999
    sizes = {graph.precision: encoder.manifest.files[graph.file].size_bytes for graph in graphs.values()}
    assert sizes["int8"] < 0.4 * sizes["fp32"]
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    for graph in fp16:
        assert graph.fp32_sites == ()
        assert not any(name.startswith("com.microsoft") for name in graph.ops)
    on_card = Encoder(tmp_path / "bundle", device="cuda")
    assert (on_card.precision, standin[-1].options["enable_cuda_graph"]) == ("fp16", "0")
    assert (on_card.encode(TEXTS) * expected).sum(axis=1).min() > 0.9999
    (hostile,) = Bundle(tmp_path / "hostile-bundle").manifest.graphs
    assert hostile.certificate is not None
    assert hostile.certificate.min_cosine >= 0.9999
    assert any("MatMul" in name for name in hostile.fp32_sites)
    n_products = sum(node.op_type == "MatMul" for node in onnx.load(tmp_path / "bundle" / fp16[0].file).graph.node)
    assert sum("MatMul" in name for name in hostile.fp32_sites) < n_products / 2


def test_without_optimum_the_message_names_the_extra(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DependencyError, match=r'environment of its own.*pip install "m3e-runtime\[cpu,export,optimum\]"'
    ):
        convert(str(tiny_checkpoint), tmp_path / "bundle", frontend="optimum")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param({"model_type": "gpt2"}, "gpt2 is a decoder; converted are encoders, .*inference", id="decoder"),
        pytest.param({"model_type": "t5"}, "t5 is a decoder", id="encoder and decoder"),
        pytest.param({"model_type": "bert", "is_decoder": True}, r"is a decoder \(is_decoder\)", id="bert as decoder"),
        pytest.param(
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}},
            "code of its own .* never run", id="remote code",
        ),
        pytest.param(  # transformers would read it as its own BERT, which computes something else
            {"model_type": "bert", "auto_map": {"AutoModel": "own.Model"}}, "code of its own .* never run",
            id="remote code under a known name",
        ),
        pytest.param({"model_type": "own"}, "transformers cannot read .*own", id="unknown to transformers"),
        pytest.param(
            {"model_type": "bert", "quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"quantised already \(quantization_config: gptq\)", id="gptq",
        ),
        pytest.param({"model_type": "clip"}, "the clip configuration has no vocab_size; it is no text", id="CLIP"),
        pytest.param({"model_type": "resnet"}, "the resnet configuration has no vocab_size", id="images"),
    ],
)  # fmt: skip
def test_what_cannot_be_traced_says_why(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError, match=reason):
        read_config(tmp_path)
