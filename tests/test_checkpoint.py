"""Every kind of checkpoint that is read or refused, on folders with few words and two layers."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoTokenizer, BertTokenizer

from benchmarks.checkpoints import vocabulary, write_json
from m3e import CheckpointError, DependencyError
from m3e_export.checkpoint import load_checkpoint
from m3e_export.modules import Dense, Modules, Normalize, read_modules
from m3e_export.pipeline import _space_id
from m3e_export.sources import fetch_checkpoint
from m3e_export.tokenizer import read_tokenizer
from tests.edited_checkpoint import (
    CONFIG,
    FILES,
    LENGTH,
    MODULES,
    POOLING,
    PROMPTS,
    TOKENIZER,
    WORDS,
    edit,
    folder,
    load,
    modules,
)
from tests.encoders import write_sentencepiece

__all__ = ["folder"]

TEXTS = [
    "", "[MASK] [CLS]x [mask]", "𠮷野家の牛丼 🍜 café CAFÉ 100％ ２０２４年", "a\u200bb\ufeff\x00c\td\ne", "x" * 101,
    "ǅ İstanbul ß naïve e\u0301", "👩‍👩‍👧 한국어 日本語，Hello, world!!",
]  # fmt: skip


NO_POOLING = {MODULES: None, POOLING: None}
NO_KEY = {"pooling_mode_mean_tokens": ...}
READ: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "legacy cls": ({POOLING: NO_KEY | {"pooling_mode_cls_token": True}}, {}, {"pooling": ("cls",)}),
    "legacy mean": ({POOLING: {"pooling_mode_cls_token": False}}, {}, {"pooling": ("mean",)}),
    "legacy, no key set": ({POOLING: NO_KEY}, {}, {"pooling": ("mean",)}),
    "pooling by name": ({POOLING: {"pooling_mode": "cls"}}, {}, {"pooling": ("cls",), "normalize": False}),
    "pooling list": ({POOLING: {"pooling_mode": ["cls"]}}, {}, {"pooling": ("cls",)}),
    "pooling file alone": ({MODULES: None, POOLING: {"pooling_mode": "cls"}}, {}, {"pooling": ("cls",)}),
    "M3E by origin": (NO_POOLING | {CONFIG: {"_name_or_path": "moka-ai/M3E-base"}}, {}, {"pooling": ("mean",)}),
    "uniem mean": (NO_POOLING | {CONFIG: {"uniem_pooling_strategy": "last_mean"}}, {}, {"pooling": ("mean",)}),
    "uniem weighted": (NO_POOLING | {CONFIG: {"uniem_pooling_strategy": "last_weighted"}}, {},
                       {"pooling": ("weightedmean",)}),
    "uniem first and last": (NO_POOLING | {CONFIG: {"uniem_pooling_strategy": "first_last_mean"}}, {},
                             {"pooling": ("first_last_mean",)}),
    "uniem's entry under sentence-transformers' modules": (
        {CONFIG: {"uniem_pooling_strategy": "cls"}}, {}, {"pooling": ("mean",)}),
    "text2vec by origin": (NO_POOLING | {CONFIG: {"_name_or_path": "shibing624/text2vec-base-chinese"}}, {},
                           {"pooling": ("mean",)}),
    "legacy, two": ({POOLING: {"pooling_mode_cls_token": True}}, {}, {"pooling": ("cls", "mean")}),
    "legacy last token": ({POOLING: NO_KEY | {"pooling_mode_lasttoken": True}}, {}, {"pooling": ("lasttoken",)}),
    "pooling list of two": ({POOLING: {"pooling_mode": ["mean", "cls"]}}, {}, {"pooling": ("mean", "cls")}),
    "prompt not pooled": ({POOLING: {"include_prompt": False}}, {}, {"include_prompt": False}),
    "Dropout": (modules("Transformer", "Pooling", "Dropout"), {}, {"head": ()}),
    "normalised twice": (modules("Transformer", "Pooling", "Normalize", "Normalize"), {"normalize": True},
                         {"head": (Normalize(),)}),
    "length file of older versions": ({LENGTH: None, "sentence_roberta_config.json": {"max_seq_length": 77}}, {},
                                      {"max_seq_length": 77}),
    "uniem cls": (NO_POOLING | {CONFIG: {"uniem_embedding_strategy": "cls"}}, {}, {"pooling": ("cls",)}),
    "Normalize": (modules("Transformer", "Pooling", "Normalize"), {}, {"normalize": True}),
    "not normalised": (modules("Transformer", "Pooling", "Normalize"), {"normalize": False}, {"normalize": False}),
    "normalised": ({}, {"normalize": True}, {"normalize": True}),
    "length": ({LENGTH: {"max_seq_length": 128}, TOKENIZER: {"model_max_length": 64}}, {}, {"max_seq_length": 128}),
    "length, tokenizer's": ({LENGTH: None, TOKENIZER: {"model_max_length": 256}}, {}, {"max_seq_length": 256}),
    "length, positions": ({LENGTH: None, TOKENIZER: {"model_max_length": 1e30}}, {}, {"max_seq_length": 512}),
    "length, null": ({LENGTH: None, TOKENIZER: {"model_max_length": None}}, {}, {"max_seq_length": 512}),
    "length, nowhere": ({LENGTH: None, TOKENIZER: None}, {}, {"max_seq_length": 512}),
    "length, shortest": ({LENGTH: {"max_seq_length": 1024}}, {"max_seq_length": 3}, {"max_seq_length": 3}),
    "length, longest": ({LENGTH: {"max_seq_length": 128}}, {"max_seq_length": 512}, {"max_seq_length": 512}),
    "prompts": ({PROMPTS: {"prompts": {"q": "q: "}, "default_prompt_name": "q", "similarity_fn_name": "dot"}}, {},
                {"prompts": {"q": "q: "}, "default_prompt_name": "q", "similarity_fn_name": "dot"}),
    "prompts, null": ({PROMPTS: {"prompts": None}}, {}, {"prompts": {}, "similarity_fn_name": "cosine"}),
}  # fmt: skip


@pytest.mark.parametrize(("edits", "asked", "expected"), READ.values(), ids=READ.keys())
def test_what_is_read(folder: Path, edits: dict[str, Any], asked: dict[str, Any], expected: dict[str, Any]) -> None:
    edit(folder, edits)
    found = load(folder, **asked)
    assert {name: getattr(found, name) for name in expected} == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model_type": ({CONFIG: {"model_type": "qwen2"}}, "model_type is 'qwen2', built here are .*--frontend optimum"),
    "T5": ({CONFIG: {"model_type": "t5"}}, "model_type is 't5'"),
    "decoder of another architecture": (
        {CONFIG: {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}},
        r"model_type is 'qwen3', built here are [\w, -]*; it is a decoder \(Qwen3ForCausalLM\); .*inference"),
    "encoder and decoder": (
        {CONFIG: {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}}, "it is a decoder"),
    "quantised": ({CONFIG: {"quantization_config": {"bits": 4}}}, "convert the checkpoint that they were made of"),
    "gptq": ({CONFIG: {"quantization_config": {"quant_method": "gptq", "bits": 4}}}, "quantised already .*: gptq"),
    "awq": ({CONFIG: {"quantization_config": {"quant_method": "awq", "bits": 4}}}, "quantised already .*: awq"),
    "bitsandbytes": ({CONFIG: {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}},
                     "quantised already .*: bitsandbytes"),
    "CLIP": ({CONFIG: {"model_type": "clip"}}, "model_type is 'clip', built here are"),
    "CLIP of sentence-transformers": (modules("CLIPModel"), "has the modules CLIPModel: it embeds images too. Made"),
    "SPLADE": (modules("MLMTransformer", "SpladePooling"), "MLMTransformer, SpladePooling: its vectors are sparse"),
    "words": (modules("StaticEmbedding"), "has the modules StaticEmbedding: it is a table of words"),
    "PyLate": (modules("Transformer", "Dense"), r"Transformer, Dense: .* vector for each token \(ColBERT\)"),
    "ColBERT": (NO_POOLING | {CONFIG: {"architectures": ["HF_ColBERT"]}}, "a HF_ColBERT: .* vector for each token"),
    "cross-encoder": (
        NO_POOLING | {CONFIG: {"architectures": ["BertForSequenceClassification"],
                               "_name_or_path": "moka-ai/m3e-base"}},
        "a BertForSequenceClassification: a cross-encoder or classifier, .* CrossEncoder"),
    "adapter alone": ({CONFIG: None, "adapter_config.json": {}}, r"holds an adapter .*merge_and_unload\(\)"),
    "cross-attention": ({CONFIG: {"add_cross_attention": True}}, "only encoders are built"),
    "adapter beside": ({"adapter_config.json": {}}, r"merge_and_unload\(\)"),
    "no model_type": ({CONFIG: {"model_type": ...}}, "model_type is None"),
    "code of its own": ({CONFIG: {"auto_map": {"AutoModel": "evil.Model"}}}, "needs code of its own"),
    "relative positions": ({CONFIG: {"position_embedding_type": "relative_key"}}, "is 'relative_key'"),
    "decoder": ({CONFIG: {"is_decoder": True}}, r"it is a decoder \(is_decoder\)"),
    "activation": ({CONFIG: {"hidden_act": "mish"}}, "hidden_act is 'mish', built here are gelu, .*--frontend optimum"),
    "heads": ({CONFIG: {"num_attention_heads": 5}}, "hidden_size 64 is no multiple of num_attention_heads"),
    "no layers": ({CONFIG: {"num_hidden_layers": 0}}, "num_hidden_layers is 0"),
    "mistyped": ({CONFIG: {"vocab_size": "300"}}, "vocab_size is '300', expected a positive int"),
    "two problems": ({CONFIG: {"hidden_size": ..., "hidden_act": "mish"}}, "hidden_size is None.*hidden_act is 'mish'"),
    "no config": ({CONFIG: None}, "is no checkpoint: it has no config.json"),
    "no weights": ({"model.safetensors": None}, "has no weights: .*found 1_Pooling, config.json"),
    "unknown pooling": ({POOLING: {"pooling_mode": ["mean", "splade"]}}, r"pooling mean \+ splade; expected some of"),
    "no pooling at all": ({POOLING: {"pooling_mode": []}}, "expected some of cls"),
    "pooling number": ({POOLING: {"pooling_mode": 5}}, "1_Pooling/config.json' cannot be read"),
    "pooling file missing": ({POOLING: None}, "1_Pooling/config.json' cannot be read"),
    "include_prompt mistyped": ({POOLING: {"include_prompt": "no"}}, "include_prompt 'no', expected true or false"),
    "no pooling": (NO_POOLING, "does not say how its tokens are pooled"),
    "uniem's unknown": (NO_POOLING | {CONFIG: {"uniem_pooling_strategy": "max"}}, "uniem's pooling 'max', expected"),
    "Dense without files": (modules("Transformer", "Pooling", "Dense"), "has no in_features and out_features"),
    "CNN": (modules("Transformer", "CNN", "Pooling"), "has the modules Transformer, CNN, Pooling; built here are"),
    "LSTM": (modules("Transformer", "LSTM", "Pooling"), "has the modules Transformer, LSTM"),
    "layers": (modules("Transformer", "WeightedLayerPooling", "Pooling"), "has the modules Transformer, WeightedLayer"),
    "Normalize of tokens": (
        modules("Transformer", "Pooling", "Normalize") | {"2_Normalize/config.json": {"module_input_name": "tokens"}},
        "has module_input_name 'tokens'"),
    "order": (modules("Transformer", "Normalize", "Pooling"), "has the modules Transformer, Normalize"),
    "subfolder without an encoder": (
        {MODULES: [{"path": "0_T", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.Pooling"}]},
        "0_T' is no checkpoint: it has no config.json"),
    "length": ({LENGTH: {"max_seq_length": 513}}, "max_seq_length is 513, expected 3 to 512"),
    "length, too short": ({LENGTH: {"max_seq_length": 2}}, "max_seq_length is 2, expected 3 to 512"),
    "length, mistyped": ({LENGTH: {"max_seq_length": "128"}}, "max_seq_length is '128', expected 3 to 512"),
    "prompts mistyped": ({PROMPTS: {"prompts": ["query"]}}, "expected an object of strings"),
    "prompt mistyped": ({PROMPTS: {"prompts": {"query": 5}}}, "expected an object of strings"),
    "default prompt": ({PROMPTS: {"prompts": {"q": ""}, "default_prompt_name": "p"}}, "is 'p', its prompts are q"),
    "no tokenizer": ({"vocab.txt": None}, "has no tokenizer: expected tokenizer.json or vocab.txt"),
}  # fmt: skip


@pytest.mark.parametrize(("edits", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(folder: Path, edits: dict[str, Any], message: str) -> None:
    edit(folder, edits)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("length", [2, 513])
def test_an_impossible_length_is_refused(folder: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=f"max_seq_length is {length}, expected 3 to 512"):
        load(folder, max_seq_length=length)


def test_m3e_by_name_has_mean_pooling(tmp_path: Path) -> None:
    assert read_modules(tmp_path, "moka-ai/M3E-base") == Modules(pooling=("mean",))


def test_fields_that_old_configs_lack_have_berts_defaults(folder: Path) -> None:
    edit(folder, {CONFIG: {"hidden_act": ..., "layer_norm_eps": ..., "type_vocab_size": ...}})
    config = load(folder).config
    assert (config.hidden_act, config.layer_norm_eps, config.type_vocab_size) == ("gelu", 1e-12, 2)


@pytest.mark.parametrize("content", [b'{"a": ', b'{"a": "\xff"}', b"[1]"], ids=["cut", "not UTF-8", "a list"])
@pytest.mark.parametrize("file", [*FILES, "tokenizer.json", "vocab.txt", "model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_is_named(folder: Path, file: str, content: bytes) -> None:
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(folder / file))):
        load(folder)


@pytest.mark.parametrize("kind", ["vocab.txt", "BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("lower_case", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"do_lower_case": False}, {"do_lower_case": False, "strip_accents": True}, {"strip_accents": False},
     {"tokenize_chinese_chars": False}],
    ids=str,
)  # fmt: skip
def test_ids_are_transformers_ids(
    tiny_checkpoint: Path, tmp_path: Path, kind: str, lower_case: bool, options: dict[str, Any]
) -> None:
    """From vocab.txt alone, and from a tokenizer.json (lower-casing or not) that the options overrule, or do not."""
    for file in ("config.json", "vocab.txt"):
        shutil.copyfile(tiny_checkpoint / file, tmp_path / file)
    if kind == "vocab.txt":
        write_json(tmp_path / TOKENIZER, {"do_lower_case": lower_case, **options})
        reference = BertTokenizer.from_pretrained(tmp_path)
    else:
        write_json(tmp_path / TOKENIZER, {"do_lower_case": lower_case})
        (tmp_path / "tokenizer.json").write_bytes(read_tokenizer(tmp_path, 21128))
        write_json(tmp_path / TOKENIZER, {"tokenizer_class": kind, **options})
        reference = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_str(read_tokenizer(tmp_path, 21128).decode())
    assert [tokenizer.encode(text).ids for text in TEXTS] == [reference(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_ids_beyond_the_embeddings_are_refused(folder: Path, file: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(read_tokenizer(folder, WORDS).decode())
    if file == "tokenizer.json":
        assert tokenizer.add_tokens(["one more"]) == 1
        tokenizer.save(str(folder / file))
    else:
        (folder / file).write_text("\n".join(vocabulary()[: WORDS + 1]), encoding="utf-8")
    with pytest.raises(CheckpointError, match="has ids up to 300, the model has 300 word embeddings"):
        load(folder)


def test_lowercasing_that_the_tokenizer_does_not_do_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m3e-cased"
    shutil.copytree(tiny_checkpoint, folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    load_checkpoint(fetch_checkpoint(str(folder)))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": True})
    with pytest.raises(CheckpointError, match="asks for do_lower_case and the tokenizer keeps case"):
        load_checkpoint(fetch_checkpoint(str(folder)))


def test_an_encoder_in_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    """As sentence-transformers 1 saved it."""
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved / "0_Transformer", ignore=shutil.ignore_patterns("1_Pooling", "modules.json"))
    shutil.move(folder / "1_Pooling", moved / "1_Pooling")
    write_json(moved / MODULES, [{"path": "0_Transformer", "type": "a.Transformer"},
                                 {"path": "1_Pooling", "type": "a.Pooling"}])  # fmt: skip
    write_json(moved / PROMPTS, {"prompts": {"q": "q: "}})
    found = load(moved)
    assert (found.folder, found.pooling, found.prompts) == (moved / "0_Transformer", ("mean",), {"q": "q: "})


def add_dense(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    edit(folder, modules("Transformer", "Pooling", "Dense"))
    write_json(folder / "2_Dense" / "config.json", {"in_features": 64, "out_features": 8, "bias": True, **config})
    torch.save(
        {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, folder / "2_Dense/pytorch_model.bin"
    )


DENSE: dict[str, Any] = {"linear.weight": np.ones((8, 64), np.float32), "linear.bias": np.ones(8, np.float32)}


def test_a_dense_module_without_a_named_activation_has_tanh(folder: Path) -> None:
    add_dense(folder, {}, DENSE)
    found = load(folder)
    (dense,) = found.head
    assert isinstance(dense, Dense)
    assert (dense.activation, dense.weight.shape, found.embedding_dim, found.normalize) == ("Tanh", (8, 64), 8, False)


def test_the_space_is_named_after_all_that_decides_a_vector(folder: Path) -> None:
    checkpoint = load(folder)

    def space(**changes: Any) -> str:
        return _space_id(dataclasses.replace(checkpoint, **changes))

    weight, bias = DENSE["linear.weight"], DENSE["linear.bias"]
    heads = [(Normalize(),), *((Dense(*parts),) for parts in (
        (weight, bias, "Tanh"), (2 * weight, bias, "Tanh"), (weight, None, "Tanh"), (weight, bias, "Identity"),
    ))]  # fmt: skip
    deciding: list[dict[str, Any]] = [
        {}, {"weights_sha256": "0"}, {"tokenizer_json": b"{}"}, {"pooling": ("cls",)}, {"pooling": ("cls", "mean")},
        {"include_prompt": False}, *({"head": head} for head in heads),
    ]  # fmt: skip
    assert len({space(**changes) for changes in deciding}) == len(deciding)
    assert space(id="another", revision="v1", folder=folder.parent, prompts={"q": "q: "}) == space()


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.Softmax"}, DENSE, "built here are torch.nn's Identity"),
        ({"activation_function": "mine.Tanh"}, DENSE, "asks for the activation 'mine.Tanh'"),
        ({"use_residual": True}, DENSE, "use_residual"),
        ({"module_output_name": "token_embeddings"}, DENSE, "module_output_name 'token_embeddings'"),
        ({"bias": False}, DENSE, r"expected {'linear.weight': \(8, 64\)}"),
        ({"out_features": 9}, DENSE, r"expected {'linear.weight': \(9, 64\)"),
        ({}, DENSE | {"linear.bias": np.full(8, np.nan, np.float32)}, "finite values"),
        ({"in_features": 65}, DENSE | {"linear.weight": np.ones((8, 65), np.float32)}, "takes 65 values, before"),
    ],
    ids=["softmax", "code", "residual", "tokens", "bias", "shape", "NaN", "width"],
)  # fmt: skip
def test_a_dense_module_that_cannot_be_built(
    folder: Path, config: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    add_dense(folder, config, tensors)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_files_of_sentencepiece_are_read_through_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sentencepiece(tmp_path)
    write_json(tmp_path / CONFIG, {"model_type": "xlm-roberta"})
    reference = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_str(read_tokenizer(tmp_path, len(reference)).decode())
    assert [tokenizer.encode(text).ids for text in TEXTS] == [reference(text).input_ids for text in TEXTS]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match=r'no tokenizer.json, .*pip install "m3e-runtime\[torch\]" sentencepiece'):
        read_tokenizer(tmp_path, len(reference))


def test_files_that_transformers_cannot_read_either(tmp_path: Path) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"damaged")
    write_json(tmp_path / CONFIG, {"model_type": "xlm-roberta"})
    with pytest.raises(CheckpointError, match=r"transformers cannot make a tokenizer\.json of the files in"):
        read_tokenizer(tmp_path, 300)
