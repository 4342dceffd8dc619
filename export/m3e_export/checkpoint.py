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
from m3e.manifest import FEWEST_TOKENS
from m3e_export.architectures import ARCHITECTURES, Architecture, EncoderConfig, expected_tensors, read_config
from m3e_export.files import read_json
from m3e_export.modules import Dense, Modules, Normalize, encoder_folder, read_modules
from m3e_export.sources import LocalCheckpoint
from m3e_export.tokenizer import read_tokenizer
from m3e_export.weights import read_weights


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        folder: Where the encoder and its tokenizer lie.
        id: Hub id, or the folder's name.
        revision: The hub's commit, None for a folder.
        config: The encoder's shape.
        tensors: Weights by BERT's names without prefix, float32; linear weights (out, in) as PyTorch keeps them.
        weights_sha256: Hash of the weight file.
        tokenizer_json: Content of a ``tokenizer.json`` that gives transformers' token ids.
        pooling: Names of the poolings, concatenated in this order.
        include_prompt: Whether a prompt's tokens are pooled too.
        head: Dense layers and normalisations behind the pooling, in order.
        max_seq_length: Longest input in tokens, special tokens included.
        prompts: Texts to put before the input, by name.
        default_prompt_name: The prompt used when none is asked for.
        similarity_fn_name: ``cosine``, ``dot``, ``euclidean`` or ``manhattan``.
    """

    folder: Path
    id: str
    revision: str | None
    config: EncoderConfig
    tensors: Mapping[str, npt.NDArray[np.float32]]
    weights_sha256: str
    tokenizer_json: bytes
    pooling: tuple[str, ...]
    include_prompt: bool
    head: tuple[Dense | Normalize, ...]
    max_seq_length: int
    prompts: dict[str, str]
    default_prompt_name: str | None
    similarity_fn_name: str

    @property
    def embedding_dim(self) -> int:
        """Length of a sentence's vector."""
        widths = [len(self.pooling) * self.config.hidden_size]
        widths += [len(module.weight) for module in self.head if isinstance(module, Dense)]
        return widths[-1]

    @property
    def normalize(self) -> bool:
        """Whether the vectors have unit length."""
        return bool(self.head) and isinstance(self.head[-1], Normalize)


def load_checkpoint(
    source: LocalCheckpoint,
    *,
    max_seq_length: int | None = None,
    normalize: bool | None = None,
    config: EncoderConfig | None = None,
) -> Checkpoint:
    """Read a checkpoint in sentence-transformers, uniem or plain transformers layout.

    Args:
        source: Folder and name.
        max_seq_length: Overrides the checkpoint's own.
        normalize: Overrides the checkpoint's own.
        config: The shape of an encoder that is not built here, for a frontend that reads the weights itself.

    Raises:
        CheckpointError: Every reason found why this checkpoint cannot be converted.
        DependencyError: A package to read it with is missing.
    """
    folder = encoder_folder(source.folder)
    is_built = config is None
    config = config or read_config(read_json(folder / "config.json"), folder / "config.json")
    modules = read_modules(source.folder, source.id)
    _check_modules(modules, config, folder)
    own = read_json(source.folder / "config_sentence_transformers.json", default={})
    sentence_config = _read_sentence_config(folder)
    tokenizer_json = read_tokenizer(folder, config.vocab_size)
    _check_lowercase(folder, sentence_config, tokenizer_json)
    prompts, default_prompt_name = _read_prompts(own, folder)
    architecture = ARCHITECTURES[config.architecture] if is_built else Architecture(prefix="")
    tensors, weights_sha256 = read_weights(folder, architecture)
    if is_built:
        _check_tensors(config, tensors, folder)
    return Checkpoint(
        folder=folder,
        id=source.id,
        revision=source.revision,
        config=config,
        tensors=tensors,
        weights_sha256=weights_sha256,
        tokenizer_json=tokenizer_json,
        pooling=modules.pooling,
        include_prompt=modules.include_prompt,
        head=_normalised(modules.head, normalize),
        max_seq_length=_max_seq_length(folder, config, sentence_config, max_seq_length),
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        similarity_fn_name=own.get("similarity_fn_name") or "cosine",
    )


def position_rows(checkpoint: Checkpoint, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """What is added to the word embeddings at each position: (rows, embedding_size) of the given type.

    Sentence encoders see one segment and one task: row 0 of those tables is added to every position. Where positions
    know pads, row 0 is a pad's and row n the n-th token's.
    """
    tensors, config = checkpoint.tensors, checkpoint.config
    start = config.padding_position or 0
    length = checkpoint.max_seq_length + (config.padding_position is not None)
    rows: npt.NDArray[Any] = tensors["embeddings.position_embeddings.weight"][start : start + length].astype(dtype)
    for name in ("embeddings.token_type_embeddings.weight", "embeddings.task_type_embeddings.weight"):
        if name in tensors:
            rows += tensors[name][0]
    return rows


def _read_sentence_config(folder: Path) -> dict[str, Any]:
    """sentence-transformers' own settings; older versions put the architecture's name into the file's."""
    for kind in ("bert", "roberta", "distilbert", "camembert", "xlm-roberta"):
        path = folder / f"sentence_{kind}_config.json"
        if path.exists():
            return read_json(path)
    return {}


def _normalised(head: tuple[Dense | Normalize, ...], asked: bool | None) -> tuple[Dense | Normalize, ...]:
    """The head with a normalisation at its end, or without, as asked."""
    if asked is None:
        return head
    while head and isinstance(head[-1], Normalize):
        head = head[:-1]
    return (*head, Normalize()) if asked else head


def _check_modules(modules: Modules, config: EncoderConfig, folder: Path) -> None:
    width = len(modules.pooling) * config.hidden_size
    for module in modules.head:
        if isinstance(module, Dense):
            if module.weight.shape[1] != width:
                raise CheckpointError(
                    f"a Dense module of {str(folder)!r} takes {module.weight.shape[1]} values, before it are {width}"
                )
            width = len(module.weight)
    if "embedding_last_mean" in modules.pooling and config.embedding_size != config.hidden_size:
        raise CheckpointError(
            f"{str(folder)!r} asks for uniem's embedding_last_mean, and its embeddings ({config.embedding_size}) are "
            f"not as wide as its layers ({config.hidden_size})"
        )


def _read_prompts(own: dict[str, Any], folder: Path) -> tuple[dict[str, str], str | None]:
    prompts, default = own.get("prompts") or {}, own.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise CheckpointError(f"the prompts of {str(folder)!r} are {prompts!r}, expected an object of strings")
    if default is not None and default not in prompts:
        available = ", ".join(prompts) or "none"
        raise CheckpointError(f"the default prompt of {str(folder)!r} is {default!r}, its prompts are {available}")
    return prompts, default


def _check_lowercase(folder: Path, sentence_config: dict[str, Any], tokenizer_json: bytes) -> None:
    """Refuse what sentence-transformers would lowercase before a tokenizer that does not."""
    normalizer = json.loads(tokenizer_json).get("normalizer") or {}
    if sentence_config.get("do_lower_case") and not normalizer.get("lowercase"):
        raise CheckpointError(
            f"sentence_bert_config.json of {str(folder)!r} asks for do_lower_case and the tokenizer keeps case; set "
            "do_lower_case in tokenizer_config.json instead"
        )


def _max_seq_length(folder: Path, config: EncoderConfig, sentence_config: dict[str, Any], asked: int | None) -> int:
    """sentence-transformers' rule: its own file, else the smaller of positions and the tokenizer's limit."""
    limit = config.max_seq_length
    own = sentence_config.get("max_seq_length")
    if own is None:
        stated = read_json(folder / "tokenizer_config.json", default={}).get("model_max_length")
        own = min(limit, stated) if isinstance(stated, (int, float)) else limit
    length = own if asked is None else asked
    if type(length) is not int or not FEWEST_TOKENS <= length <= limit:
        raise CheckpointError(
            f"max_seq_length is {length!r}, expected {FEWEST_TOKENS} to {limit} (the model's positions); "
            "--max-seq-length sets another"
        )
    return length


def _check_tensors(config: EncoderConfig, tensors: Mapping[str, npt.NDArray[np.float32]], folder: Path) -> None:
    expected = expected_tensors(config)
    problems = []
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"{name} is missing")
        elif tensors[name].shape != shape:
            problems.append(f"{name} has shape {tensors[name].shape}, config.json says {shape}")
        elif not np.isfinite(tensors[name]).all():
            problems.append(f"{name} has values that are not finite")
    problems += [
        f"{name} is unknown in a {config.architecture} encoder" for name in sorted(tensors.keys() - expected.keys())
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"the weights in {str(folder)!r} do not fit: {shown}")
