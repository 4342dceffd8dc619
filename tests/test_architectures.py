"""Every architecture with every pooling in every precision, against sentence-transformers with PyTorch in FP32."""

from __future__ import annotations

import functools
import json
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
from m3e_export import modules
from m3e_export.builder import RECTANGLE, GraphBuilder
from m3e_export.encoder_math import FARTHEST, FUNCTIONS, bias_by_distance
from m3e_export.graph import build_graph
from m3e_export.pipeline import convert
from m3e_export.pooling_graph import append_function
from m3e_export.reference import numpy_token_embeddings
from tests.agreement import (
    ARCHITECTURES,
    POOLINGS,
    TEXTS,
    TOLERANCE,
    UNIEM,
    Array,
    agree,
    embedder,
    encoder_folder,
    hidden_states,
    load,
    unit,
)
from tests.encoders import HIDDEN, KINDS
from tests.environments import ROOT

PROVIDERS = ["CPUExecutionProvider"]


@functools.cache
def transformer(kind: str) -> Transformer:
    return Transformer(str(encoder_folder(kind)), max_seq_length=512)


def expected_vectors(kind: str, folder: Path, pooling: list[str], head: str) -> Array:
    if pooling[0] in UNIEM:  # uniem/model.py, FirstLastEmbedder and EmbeddingLastEmbedder
        other = 0 if pooling == ["embedding_last_mean"] else 1
        every = hidden_states(encoder_folder(kind))
        return np.stack([(states[other].mean(axis=0) + states[2].mean(axis=0)) / 2 for states in every])
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
    agree(vectors, expected, precision)
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
