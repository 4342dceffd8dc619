"""A checkpoint's folder -> everything the exporter needs to know of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.errors import CheckpointError
from m3e_export.pooling import read_pooling
from m3e_export.sources import LocalCheckpoint
from m3e_export.tokenizer import read_tokenizer
from m3e_export.weights import read_weights

# transformers' names of activations -> the attribute `approximate` of ONNX's Gelu.
GELU_APPROXIMATION = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BertConfig:
    """The fields of ``config.json`` that decide a BERT encoder's numbers."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        folder: Where it lies.
        id: Hub id, or the folder's name.
        revision: The hub's commit, None for a folder.
        config: The encoder's shape.
        tensors: Weights by BERT's names without prefix, float32; linear weights (out, in) as PyTorch keeps them.
        weights_sha256: Hash of the weight file.
        tokenizer_json: Content of a ``tokenizer.json`` that gives transformers' token ids.
        pooling: sentence-transformers' names of the poolings, concatenated in this order.
        normalize: Whether the vectors are scaled to unit length.
        max_seq_length: Longest input in tokens, special tokens included.
        prompts: Texts to put before the input, by name.
        default_prompt_name: The prompt used when none is asked for.
        similarity_fn_name: ``cosine``, ``dot``, ``euclidean`` or ``manhattan``.
    """

    folder: Path
    id: str
    revision: str | None
    config: BertConfig
    tensors: Mapping[str, npt.NDArray[np.float32]]
    weights_sha256: str
    tokenizer_json: bytes
    pooling: tuple[str, ...]
    normalize: bool
    max_seq_length: int
    prompts: dict[str, str]
    default_prompt_name: str | None
    similarity_fn_name: str


def load_checkpoint(
    source: LocalCheckpoint,
    *,
    max_seq_length: int | None = None,
    normalize: bool | None = None,
    config: BertConfig | None = None,
) -> Checkpoint:
    """Read a BERT checkpoint in sentence-transformers or plain transformers layout.

    Args:
        source: Folder and name.
        max_seq_length: Overrides the checkpoint's own.
        normalize: Overrides the checkpoint's own.
        config: The shape of an encoder that is not BERT, for a frontend that reads the weights itself; None for BERT.

    Raises:
        CheckpointError: Every reason found why this checkpoint cannot be converted.
        DependencyError: A package to read it with is missing.
    """
    folder = source.folder
    raw_config = read_json(folder / "config.json")
    is_bert = config is None
    config = _read_config(raw_config, folder) if config is None else config
    pooling, has_normalize = read_pooling(folder, raw_config, source.id)
    own = read_json(folder / "config_sentence_transformers.json", default={})
    tokenizer_json = read_tokenizer(folder, config.vocab_size)
    _check_lowercase(folder, tokenizer_json)
    prompts, default_prompt_name = _read_prompts(own, folder)
    tensors, weights_sha256 = read_weights(folder)
    if is_bert:
        _check_tensors(config, tensors, folder)
    return Checkpoint(
        folder=folder,
        id=source.id,
        revision=source.revision,
        config=config,
        tensors=tensors,
        weights_sha256=weights_sha256,
        tokenizer_json=tokenizer_json,
        pooling=pooling,
        normalize=has_normalize if normalize is None else normalize,
        max_seq_length=_max_seq_length(folder, config, max_seq_length),
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        similarity_fn_name=own.get("similarity_fn_name") or "cosine",
    )


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: Missing without a default, or not a JSON object.
    """
    if default is not None and not path.exists():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(path.parent)!r} is no checkpoint: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(content).__name__}, expected a JSON object")
    return content


def _read_config(raw: dict[str, Any], folder: Path) -> BertConfig:
    problems = []
    if raw.get("model_type") != "bert":
        problems.append(f"model_type is {raw.get('model_type')!r}, supported is 'bert'")
    if "auto_map" in raw:
        problems.append("it needs code of its own (auto_map), which is never run")
    for name, accepted in (
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
        ("add_cross_attention", False),
    ):
        if raw.get(name, accepted) != accepted:
            problems.append(f"{name} is {raw[name]!r}, supported is {accepted!r}")
    if str(raw.get("hidden_act", "gelu")) not in GELU_APPROXIMATION:
        problems.append(f"hidden_act is {raw['hidden_act']!r}, supported are {', '.join(GELU_APPROXIMATION)}")
    values: dict[str, Any] = {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "type_vocab_size": 2}
    for field in dataclasses.fields(BertConfig):
        value = raw.get(field.name, values.get(field.name))
        kind = {"int": int, "float": float, "str": str}[str(field.type)]
        if type(value) is not kind or (isinstance(value, int) and value <= 0):
            problems.append(f"{field.name} is {value!r}, expected a positive {field.type}")
        values[field.name] = value
    if not problems and values["hidden_size"] % values["num_attention_heads"]:
        problems.append(f"hidden_size {values['hidden_size']} is no multiple of num_attention_heads")
    if problems:
        raise CheckpointError(f"{str(folder / 'config.json')!r} cannot be converted: {'; '.join(problems)}")
    return BertConfig(**values)


def _read_prompts(own: dict[str, Any], folder: Path) -> tuple[dict[str, str], str | None]:
    prompts, default = own.get("prompts") or {}, own.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise CheckpointError(f"the prompts of {str(folder)!r} are {prompts!r}, expected an object of strings")
    if default is not None and default not in prompts:
        available = ", ".join(prompts) or "none"
        raise CheckpointError(f"the default prompt of {str(folder)!r} is {default!r}, its prompts are {available}")
    return prompts, default


def _check_lowercase(folder: Path, tokenizer_json: bytes) -> None:
    """Refuse what sentence-transformers would lowercase before a tokenizer that does not."""
    asked = read_json(folder / "sentence_bert_config.json", default={}).get("do_lower_case")
    normalizer = json.loads(tokenizer_json).get("normalizer") or {}
    if asked and not normalizer.get("lowercase"):
        raise CheckpointError(
            f"sentence_bert_config.json of {str(folder)!r} asks for do_lower_case and the tokenizer keeps case; set "
            "do_lower_case in tokenizer_config.json instead"
        )


def _max_seq_length(folder: Path, config: BertConfig, asked: int | None) -> int:
    """sentence-transformers' rule: its own file, else the smaller of positions and the tokenizer's limit."""
    limit = config.max_position_embeddings
    own = read_json(folder / "sentence_bert_config.json", default={}).get("max_seq_length")
    if own is None:
        stated = read_json(folder / "tokenizer_config.json", default={}).get("model_max_length")
        own = min(limit, stated) if isinstance(stated, (int, float)) else limit
    length = own if asked is None else asked
    if type(length) is not int or not 3 <= length <= limit:
        raise CheckpointError(f"max_seq_length is {length!r}, expected 3 to {limit} (the model's positions)")
    return length


def _check_tensors(config: BertConfig, tensors: Mapping[str, npt.NDArray[np.float32]], folder: Path) -> None:
    hidden, inner = config.hidden_size, config.intermediate_size
    expected: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, hidden),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, hidden),
    }
    linears = {
        "attention.self.query": (hidden, hidden),
        "attention.self.key": (hidden, hidden),
        "attention.self.value": (hidden, hidden),
        "attention.output.dense": (hidden, hidden),
        "intermediate.dense": (inner, hidden),
        "output.dense": (hidden, inner),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(config.num_hidden_layers):
        for name, size in linears.items():
            expected[f"encoder.layer.{i}.{name}.weight"] = size
            expected[f"encoder.layer.{i}.{name}.bias"] = size[:1]
        norms += [f"encoder.layer.{i}.attention.output.LayerNorm", f"encoder.layer.{i}.output.LayerNorm"]
    for name in norms:
        expected[f"{name}.weight"] = expected[f"{name}.bias"] = (hidden,)
    problems = []
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"{name} is missing")
        elif tensors[name].shape != shape:
            problems.append(f"{name} has shape {tensors[name].shape}, config.json says {shape}")
        elif not np.isfinite(tensors[name]).all():
            problems.append(f"{name} has values that are not finite")
    problems += [f"{name} is unknown in a BERT encoder" for name in sorted(tensors.keys() - expected.keys())]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"the weights in {str(folder)!r} do not fit: {shown}")
