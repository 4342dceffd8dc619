"""Every architecture with every pooling in every precision, against sentence-transformers with PyTorch in FP32."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from benchmarks.checkpoints import write_json
from m3e import Encoder
from m3e.plan import attention_length, plan_batches
from m3e.session import Session
from m3e.tokenizer import Tokenizer
from m3e_export import modules
from m3e_export.builder import RECTANGLE, GraphBuilder
from m3e_export.calibrate import calibrate
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.encoder_math import FARTHEST, FUNCTIONS, bias_by_distance
from m3e_export.fit import Int8Site
from m3e_export.graph import build_graph
from m3e_export.int8 import Int8Steps, quantize_rows
from m3e_export.pipeline import convert
from m3e_export.pooling_graph import append_function
from m3e_export.quantize import calibration_ids
from m3e_export.reference import numpy_token_embeddings
from m3e_export.sources import LocalCheckpoint
from m3e_export.texts import corpus
from tests.encoders import HIDDEN, KINDS, write_encoder, write_modules
from tests.environments import ROOT

Array = np.ndarray[Any, Any]
PROVIDERS = ["CPUExecutionProvider"]

ARCHITECTURES = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet", "ernie"]
# Poolings, and the modules behind them.
POOLINGS: dict[str, tuple[list[str], str]] = {
    "cls": (["cls"], ""),
    "mean": (["mean"], ""),
    "max": (["max"], ""),
    "mean_sqrt_len_tokens": (["mean_sqrt_len_tokens"], ""),
    "weightedmean": (["weightedmean"], ""),
    "lasttoken": (["lasttoken"], ""),
    "cls+max+mean": (["cls", "max", "mean"], ""),
    "mean, Normalize": (["mean"], "Normalize"),
    "cls, Dense, Normalize": (["cls"], "Dense:Tanh:48 Normalize"),
    "mean+lasttoken, Normalize, Dense, Dense": (
        ["mean", "lasttoken"],
        "Normalize Dense:ReLU:96 Dense:Identity:32:nobias",
    ),
}
UNIEM = ["first_last_mean", "embedding_last_mean"]
TOLERANCE = 2e-6  # largest difference of a component of unit vectors
MEAN_COSINE, MIN_COSINE = 0.9995, 0.999  # of int8

TEXTS = [
    "", "好", "<pad> a <pad><pad> b [PAD]", "今天天气真好，我们去公园散步吧。", "How do I reset my password? " * 3,
    "合同约定的交货日期为3月15日，" * 9, "12,345 people watch on https://example.com/a?b=c " * 40,
    *corpus("zh")[5::300], *corpus("en")[5::350],
]  # fmt: skip


@functools.cache
def encoder_folder(kind: str) -> Path:
    return write_encoder(Path(tempfile.mkdtemp()) / kind, kind)


@functools.cache
def transformer(kind: str) -> Transformer:
    return Transformer(str(encoder_folder(kind)), max_seq_length=512)


@functools.cache
def hidden_states(kind: str) -> list[tuple[Array, Array, Array]]:
    """Word embeddings, embeddings and last layer of each text by transformers, each text by itself."""
    model: Any = transformers.AutoModel.from_pretrained(encoder_folder(kind))
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(encoder_folder(kind))
    states = []
    with torch.inference_mode():
        for text in TEXTS:
            ids = tokenizer(text, truncation=True, max_length=512, return_tensors="pt").input_ids
            found = model(ids, output_hidden_states=True).hidden_states
            words = model.get_input_embeddings()(ids)
            states.append((words[0].numpy(), found[0][0].numpy(), found[-1][0].numpy()))
    return states


def load(kind: str, pooling: list[str], head: str = "", *, include_prompt: bool = True) -> tuple[Path, Checkpoint]:
    """A folder of the kind's encoder with these modules: the weights are the same file for all."""
    folder = Path(tempfile.mkdtemp()) / "checkpoint"
    folder.mkdir()
    for file in encoder_folder(kind).iterdir():
        os.link(file, folder / file.name)
    if pooling[0] in UNIEM:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").unlink()
        write_json(folder / "config.json", config | {"uniem_pooling_strategy": pooling[0]})
    else:
        write_modules(folder, pooling, head, include_prompt=include_prompt)
    return folder, load_checkpoint(LocalCheckpoint(folder, kind, None))


@functools.cache
def sites(kind: str) -> dict[str, Int8Site]:
    _, checkpoint = load(kind, ["mean"])
    levels, scales = quantize_rows(checkpoint.tensors["embeddings.word_embeddings.weight"])
    return calibrate(checkpoint, calibration_ids(checkpoint, None)[:80], levels * scales)[0]


def embedder(kind: str, checkpoint: Checkpoint, precision: str) -> Callable[..., Array]:
    """What `Encoder.encode` does, on a graph that is in no bundle."""
    int8 = functools.partial(Int8Steps, sites=sites(kind), signed=True) if precision == "int8" else None
    session = Session(build_graph(checkpoint, int8).SerializeToString(), num_threads=1)
    tokenizer = Tokenizer(checkpoint.tokenizer_json, checkpoint.max_seq_length)

    def embed(texts: list[str], prompt_length: int = 0) -> Array:
        tokens = tokenizer(texts)
        vectors = np.empty((len(texts), checkpoint.embedding_dim), np.float32)
        for rows in plan_batches(tokens.n_tokens, 1024):
            width = int(attention_length(tokens.n_tokens[rows]).max())
            vectors[rows] = session.run([tokens.input_ids[row] for row in rows], width, prompt_length=prompt_length)
        return vectors

    return embed


def unit(vectors: Array) -> Array:
    rows: Array = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return rows


def expected_vectors(kind: str, folder: Path, pooling: list[str], head: str) -> Array:
    if pooling[0] in UNIEM:  # uniem/model.py, FirstLastEmbedder and EmbeddingLastEmbedder
        other = 0 if pooling == ["embedding_last_mean"] else 1
        return np.stack([(states[other].mean(axis=0) + states[2].mean(axis=0)) / 2 for states in hidden_states(kind)])
    parts: list[Any] = [transformer(kind), Pooling.load(str(folder / "1_Pooling"))]
    for i, name in enumerate(head.split(), 2):
        part = name.split(":")[0]
        parts.append(Normalize() if part == "Normalize" else Dense.load(str(folder / f"{i}_{part}")))
    model = SentenceTransformer(modules=parts, device="cpu")
    vectors: Array = model.encode(TEXTS, batch_size=8, show_progress_bar=False)
    return vectors


def rows() -> list[Any]:
    """The whole table; by default every pooling of BERT, two of each other architecture, and int8 with the mean."""
    rows = []
    names = [*POOLINGS, *UNIEM]
    for i, kind in enumerate(KINDS):
        for j, name in enumerate(names if kind in ARCHITECTURES else ["mean"]):
            if (kind, name) == ("electra", "embedding_last_mean"):
                continue  # refused: its word embeddings are narrower than its layers
            for precision in ("fp32", "int8"):
                if precision == "fp32":
                    chosen = name == "mean" or kind == "bert" or j == i % len(names)
                else:
                    chosen = name == "mean" and kind in ARCHITECTURES
                marks = () if chosen else pytest.mark.long
                rows.append(pytest.param(kind, name, precision, marks=marks, id=f"{kind}, {name}, {precision}"))
    return rows


@pytest.mark.parametrize(("kind", "name", "precision"), rows())
def test_it_is_pytorchs(kind: str, name: str, precision: str) -> None:
    pooling, head = POOLINGS.get(name, ([name], ""))
    folder, checkpoint = load(kind, pooling, head)
    expected = expected_vectors(kind, folder, pooling, head)
    embed = embedder(kind, checkpoint, precision)
    vectors = embed(TEXTS)
    assert vectors.shape == expected.shape == (len(TEXTS), checkpoint.embedding_dim)
    if precision == "fp32":
        assert np.abs(unit(vectors) - unit(expected)).max() <= TOLERANCE
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-5)
    else:
        cosines = (unit(vectors) * unit(expected)).sum(axis=1)
        assert cosines.mean() >= MEAN_COSINE
        assert cosines.min() >= MIN_COSINE
    some = range(0, len(TEXTS), 5)
    alone = np.concatenate([embed([TEXTS[i]]) for i in some])
    np.testing.assert_array_equal(alone, vectors[list(some)])


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "mpnet"])
def test_padding_on_the_left_counts_positions_as_pytorch_does(kind: str) -> None:
    _, checkpoint = load(kind, ["mean", "cls", "lasttoken", "weightedmean"])
    pad = transformers.AutoConfig.from_pretrained(encoder_folder(kind)).pad_token_id
    ids = [[pad, pad, 0, 30, pad, 40, 2], [0, 30, 40, 50, 60, 70, 2]]
    mask = [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
    model: Any = transformers.AutoModel.from_pretrained(encoder_folder(kind))
    with torch.inference_mode():
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        tokens = model(**inputs).last_hidden_state
        pooling = Pooling(HIDDEN, ["mean", "cls", "lasttoken", "weightedmean"])
        expected = pooling({"token_embeddings": tokens, **inputs})["sentence_embedding"].numpy()
    session = onnxruntime.InferenceSession(build_graph(checkpoint).SerializeToString(), providers=PROVIDERS)
    found = session.run(None, {"input_ids": np.array(ids), "attention_mask": np.array(mask)})[0]
    np.testing.assert_allclose(found, expected, atol=3e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "electra", "ernie"])
def test_the_numpy_reference_is_pytorchs_in_float64(kind: str) -> None:
    _, checkpoint = load(kind, ["mean"])
    model: Any = transformers.AutoModel.from_pretrained(encoder_folder(kind), dtype=torch.float64)
    ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 300).tolist()
    ids[10] = 1
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    assert np.abs(numpy_token_embeddings(checkpoint, ids) - expected).max() < 1e-10


@pytest.mark.parametrize("pooling", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_a_prompt_that_is_not_pooled(pooling: str) -> None:
    folder, checkpoint = load("bert", [pooling], include_prompt=False)
    parts: list[Any] = [transformer("bert"), Pooling.load(str(folder / "1_Pooling"))]
    model = SentenceTransformer(modules=parts, device="cpu")
    prompt = "为这个句子生成表示："
    texts = [text for text in TEXTS if len(text) < 200]
    expected = unit(model.encode(texts, prompt=prompt, show_progress_bar=False))
    embed = embedder("bert", checkpoint, "fp32")
    found = unit(embed([prompt + text for text in texts], len(prompt) + 1))
    assert np.abs(found - expected).max() <= TOLERANCE
    with_it = np.abs(unit(embed([prompt + text for text in texts], 0)) - expected).max()
    assert (with_it > 1e-3) == (pooling != "lasttoken")


def test_the_buckets_of_relative_positions_are_pytorchs() -> None:
    table = np.arange(32, dtype=np.float32)[:, None]
    bias = bias_by_distance(table)[0]
    distance = torch.arange(-600, 601)
    buckets = MPNetEncoder.relative_position_bucket(distance).numpy()
    np.testing.assert_array_equal(bias[np.clip(distance.numpy(), -FARTHEST, FARTHEST) + FARTHEST], buckets)


def test_a_whole_conversion_with_a_head(tmp_path: Path) -> None:
    """xlm-roberta, two poolings, Dense: certified, described, and written for other tools."""
    folder, checkpoint = load("xlm-roberta", ["cls", "mean"], "Dense:Tanh:48 Normalize", include_prompt=False)
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "query: "}})
    manifest = convert(str(folder), tmp_path / "bundle")
    model = manifest.model
    assert (model.architecture, model.pooling, model.embedding_dim) == ("xlm-roberta", ("cls", "mean"), 48)
    assert (model.include_prompt, model.normalize, model.max_seq_length) == (False, True, 512)
    encoder, peer = Encoder(tmp_path / "bundle"), SentenceTransformer(str(folder), device="cpu")
    for prompt_name in (None, "query"):
        expected = peer.encode(TEXTS[:5], prompt_name=prompt_name, show_progress_bar=False)
        assert np.abs(encoder.encode(TEXTS[:5], prompt_name) - expected).max() <= TOLERANCE
    bundle = tmp_path / "bundle"
    kinds = [entry["type"].rsplit(".", 1)[-1] for entry in json.loads((bundle / "modules.json").read_text("utf-8"))]
    assert kinds == ["Transformer", "Pooling", "Dense", "Normalize"]
    pooling, dense = Pooling.load(str(bundle / "1_Pooling")), Dense.load(str(bundle / "2_Dense"))
    assert (pooling.pooling_mode, pooling.include_prompt) == (("cls", "mean"), False)
    ours = checkpoint.head[0]
    assert isinstance(ours, modules.Dense)
    np.testing.assert_array_equal(dense.linear.weight.detach().numpy(), ours.weight)
    assert isinstance(dense.activation_function, torch.nn.Tanh)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_are_the_same_in_graph_and_numpy(function: str) -> None:
    builder = GraphBuilder({"input_ids": RECTANGLE})
    x = builder.op("Cast", "input_ids", to=onnx.TensorProto.FLOAT)
    y = append_function(builder, function, builder.op("Mul", x, builder.const("step", 0.01, np.float32)))
    model = builder.finish({"y": (y, ["batch", "seq_len"])})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=PROVIDERS)
    steps = np.arange(-1000, 1000)[None]
    (found,) = session.run(None, {"input_ids": steps})
    np.testing.assert_allclose(found, FUNCTIONS[function](steps * 0.01), atol=2e-6)


@pytest.mark.checkout
def test_the_page_has_a_cell_for_every_row() -> None:
    """docs/checkpoints.md: the table of architectures and poolings."""
    columns = {
        "cls": ["cls"], "mean": ["mean"], "max": ["max"], "mean_sqrt_len_tokens": ["mean_sqrt_len_tokens"],
        "weightedmean": ["weightedmean"], "lasttoken": ["lasttoken"], "several, concatenated": ["cls+max+mean"],
        "Dense, Normalize": [name for name, (_, head) in POOLINGS.items() if head],
        "first_last_mean": ["first_last_mean"], "embedding_last_mean": ["embedding_last_mean"],
    }  # fmt: skip
    assert sorted(name for names in columns.values() for name in names) == sorted([*POOLINGS, *UNIEM])
    kinds = {
        "BERT": ["bert"], "RoBERTa": ["roberta"], "XLM-RoBERTa": ["xlm-roberta"], "CamemBERT": ["camembert"],
        "DistilBERT": ["distilbert"], "ELECTRA, embeddings of another width": ["electra"],
        "ELECTRA, embeddings as wide as the layers": ["electra-wide"], "MPNet": ["mpnet"], "ERNIE 2 and 3": ["ernie"],
    }  # fmt: skip
    tested = {tuple(row.values) for row in rows()}
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8").partition("## Architectures and poolings")[2]
    table = [line for line in page.split("\n") if line.startswith("|")][: 2 + len(kinds)]
    header, _, *lines = ([cell.strip() for cell in line[1:-1].split("|")] for line in table)
    assert header == ["architecture", "`model_type`", *columns]
    assert [line[0] for line in lines] == list(kinds)
    for name, _, *cells in lines:
        for cell, poolings in zip(cells, columns.values(), strict=True):
            (kind,) = kinds[name]
            found = {precision for precision in ("fp32", "int8") for pooling in poolings
                     if (kind, pooling, precision) in tested}  # fmt: skip
            every = all((kind, pooling, precision) in tested for pooling in poolings for precision in found)
            assert every
            assert set(cell.split()) == found or (cell == "refused (1)" and not found), (name, poolings, cell)
