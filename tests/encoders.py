"""Checkpoints of every kind with random weights, made by transformers itself and small enough for many tests."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import sentencepiece
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from benchmarks.checkpoints import write_json
from m3e_export.texts import corpus

HIDDEN, POSITIONS = 64, 512
_SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    "type_vocab_size": 2,
}  # fmt: skip
_FAIRSEQ: dict[str, Any] = {
    **_SHAPE, "max_position_embeddings": POSITIONS + 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
# Name of a kind: tokenizer, and the configuration without its vocabulary.
KINDS: dict[str, tuple[str, Any]] = {
    "bert": ("wordpiece", functools.partial(transformers.BertConfig, **_SHAPE)),
    "bert-gelu_new": ("wordpiece", functools.partial(transformers.BertConfig, **_SHAPE, hidden_act="gelu_new")),
    "bert-relu": ("wordpiece", functools.partial(transformers.BertConfig, **_SHAPE, hidden_act="relu")),
    "bert-silu": ("wordpiece", functools.partial(transformers.BertConfig, **_SHAPE, hidden_act="silu")),
    "bert-unigram": ("unigram", functools.partial(transformers.BertConfig, **_SHAPE)),
    "roberta": ("bpe", functools.partial(transformers.RobertaConfig, **_FAIRSEQ)),
    "xlm-roberta": ("unigram", functools.partial(transformers.XLMRobertaConfig, **_FAIRSEQ)),
    "camembert": ("unigram", functools.partial(transformers.CamembertConfig, **_FAIRSEQ)),
    "distilbert": (
        "wordpiece",
        functools.partial(transformers.DistilBertConfig, dim=HIDDEN, n_layers=3, n_heads=4, hidden_dim=128),
    ),
    "electra": ("wordpiece", functools.partial(transformers.ElectraConfig, **_SHAPE, embedding_size=32)),
    "electra-wide": ("wordpiece", functools.partial(transformers.ElectraConfig, **_SHAPE, embedding_size=HIDDEN)),
    "mpnet": (
        "wordpiece-mpnet",
        functools.partial(transformers.MPNetConfig, **{k: v for k, v in _FAIRSEQ.items() if k != "type_vocab_size"}),
    ),
    "ernie": ("wordpiece", functools.partial(transformers.ErnieConfig, **_SHAPE, use_task_id=True)),
    "ernie-2": ("wordpiece", functools.partial(transformers.ErnieConfig, **_SHAPE)),
}


def write_encoder(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """Write an encoder with its tokenizer as transformers saves them, without anything about pooling."""
    tokenizer_kind, make_config = KINDS[kind]
    tokenizer = make_tokenizer(tokenizer_kind)
    torch.manual_seed(seed)
    config = make_config(vocab_size=tokenizer.get_vocab_size(), initializer_range=0.05)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases as they are after training, not 1 and 0
            parameter += 0.05 * torch.randn_like(parameter) * ("bias" in name.lower() or "norm" in name.lower())
            if name == "encoder.relative_attention_bias.weight":
                parameter *= 20  # of the size of the scores, so that a wrong bucket shows
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    classes = {
        "wordpiece": "BertTokenizer",
        "wordpiece-mpnet": "MPNetTokenizer",
        "bpe": "RobertaTokenizer",
        "unigram": "XLMRobertaTokenizer",
    }
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": classes[tokenizer_kind], "do_lower_case": True, "model_max_length": POSITIONS},
    )
    return folder


def write_modules(folder: Path, pooling: list[str], head: str = "", *, include_prompt: bool = True) -> None:
    """Write sentence-transformers' modules behind an encoder.

    Args:
        folder: The encoder's folder.
        pooling: Names of poolings.
        head: Modules behind them, separated by spaces: ``Normalize``, or ``Dense`` with its activation and width, such
            as ``Dense:Tanh:32``, and ``:nobias``.
        include_prompt: Whether prompts are pooled.
    """
    kinds = ["Transformer", "Pooling", *head.split()]
    modules = []
    width = len(pooling) * HIDDEN
    rng = np.random.default_rng(0)
    for i, kind in enumerate(kinds):
        name, *options = kind.split(":")
        path = f"{i}_{name}" if i else ""
        modules.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"})
        if name == "Dense":
            out = int(options[1])
            weights = {"linear.weight": rng.standard_normal((out, width), dtype=np.float32) / np.float32(width**0.5)}
            if "nobias" not in options:
                weights["linear.bias"] = rng.standard_normal(out, dtype=np.float32) / 10
            submodule = "linear" if options[0] == "Identity" else "activation"
            write_json(
                folder / path / "config.json",
                {
                    "in_features": width,
                    "out_features": out,
                    "bias": "linear.bias" in weights,
                    "activation_function": f"torch.nn.modules.{submodule}.{options[0]}",
                },
            )
            safetensors.numpy.save_file(weights, folder / path / "model.safetensors")
            width = out
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "1_Pooling" / "config.json",
        {"embedding_dimension": HIDDEN, "pooling_mode": pooling, "include_prompt": include_prompt},
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": POSITIONS, "do_lower_case": False})


def write_sentencepiece(folder: Path) -> None:
    """Train a SentencePiece model and write it as XLM-RoBERTa's checkpoints carry it."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*corpus("zh")[::4], *corpus("en")[::4]]),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=3000,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer"})


@functools.cache
def make_tokenizer(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer of the kind, with a vocabulary from the corpus that ships with the exporter."""
    texts = [*corpus("zh")[::4], *corpus("en")[::4]]
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if kind == "unigram":
        with tempfile.TemporaryDirectory() as folder:
            write_sentencepiece(Path(folder))
            made: Any = transformers.XLMRobertaTokenizer.from_pretrained(folder)
        return tokenizers.Tokenizer.from_str(made.backend_tokenizer.to_str())
    if kind == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        bpe = trainers.BpeTrainer(
            vocab_size=1500,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, bpe)
    else:
        mpnet = kind == "wordpiece-mpnet"
        names = [*specials, "[UNK]"] if mpnet else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = sorted({character for text in texts for character in text.lower() if not character.isspace()})
        words += [f"##{character}" for character in "abcdefghijklmnopqrstuvwxyz0123456789"]
        vocabulary = {word: i for i, word in enumerate([*names, *words])}
        tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.add_special_tokens(names)
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        specials = ["<s>", "<pad>", "</s>"] if mpnet else ["[CLS]", "[PAD]", "[SEP]"]
    first, _, last = specials[:3]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)],
    )
    return tokenizer
