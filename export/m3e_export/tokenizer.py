"""A checkpoint's tokenizer files -> one ``tokenizer.json`` with transformers' token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m3e.errors import CheckpointError, DependencyError
from m3e.tokenizer import is_failure
from m3e.tokenizer_check import tokenizer_problems
from m3e_export.files import read_json

# tokenizer_config.json -> BertNormalizer, with the default of the first. transformers' WordPiece tokenizers let the
# first overrule the second, their defaults included; other classes take tokenizer.json as it is.
_NORMALIZER_OPTIONS = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}
_BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", None)  # None: left open
_WORDPIECE_CLASSES = (*_BERT_CLASSES, "MPNetTokenizer")
# Vocabularies of tokenizers that transformers can make a tokenizer.json of.
_VOCABULARIES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")
# Of BERT's and RoBERTa's families.
_SPECIAL_TOKENS = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}


def read_tokenizer(folder: Path, vocab_size: int) -> bytes:
    """Read ``tokenizer.json``, or build it from BERT's ``vocab.txt``, or let transformers build it from other files.

    Args:
        folder: The checkpoint's folder.
        vocab_size: Rows of the word embeddings; every token id must be smaller.

    Returns:
        Content of a ``tokenizer.json``, without truncation or padding.

    Raises:
        DependencyError: Files that only transformers can read, and it is not installed.
        CheckpointError: No tokenizer, a damaged one, or one with more tokens than the model has embeddings.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    options, kind = _read_options(folder / "tokenizer_config.json")
    if path.exists():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if kind in _WORDPIECE_CLASSES and (content.get("normalizer") or {}).get("type") == "BertNormalizer":
                content["normalizer"].update(options)
            _check(content, path, vocab_size)
            tokenizer = Tokenizer.from_str(json.dumps(content))
        except CheckpointError:
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            raise CheckpointError(f"{str(path)!r} cannot be read as a tokenizer: {error}") from error
    elif (folder / "vocab.txt").exists() and kind in _BERT_CLASSES:
        tokenizer = _from_vocabulary(folder / "vocab.txt", options)
    elif any((folder / name).exists() for name in _VOCABULARIES):
        tokenizer = _by_transformers(folder)
    else:
        raise CheckpointError(
            f"{str(folder)!r} has no tokenizer: expected tokenizer.json or vocab.txt, or {', '.join(_VOCABULARIES[1:])}"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    data = str(tokenizer.to_str(pretty=False)).encode("utf-8")
    _check(json.loads(data), folder, vocab_size)
    return data


def complete_config(
    own: dict[str, Any], special_tokens: dict[str, Any], tokenizer_json: bytes, max_seq_length: int
) -> dict[str, Any]:
    """Complete ``tokenizer_config.json`` for tools that pad and truncate by it (transformers.js, fastembed).

    Args:
        own: The checkpoint's, possibly empty.
        special_tokens: Its ``special_tokens_map.json``, which older checkpoints have instead.
        tokenizer_json: Whose tokens may be named.
        max_seq_length: Longest input in tokens, which these tools know as ``model_max_length``.

    Returns:
        The content to write.
    """
    added = {token["content"] for token in json.loads(tokenizer_json)["added_tokens"]}
    usual = {
        name: next((content for content in contents if content in added), None)
        for name, contents in _SPECIAL_TOKENS.items()
    }
    named = {name: content for name, content in usual.items() if content is not None}
    classes = {"tokenizer_class": "PreTrainedTokenizerFast"} if not own else {}
    return {**named, **special_tokens, **classes, **own, "model_max_length": max_seq_length}


def _check(content: Any, path: Path, vocab_size: int) -> None:
    if problems := tokenizer_problems(content, vocab_size):
        raise CheckpointError(f"the tokenizer of {str(path)!r} cannot be converted: {'; '.join(problems)}")


def _read_options(path: Path) -> tuple[dict[str, Any], str | None]:
    """The BertNormalizer's arguments, and the name of the tokenizer's class."""
    content = read_json(path, default={})
    options = {ours: content.get(theirs, default) for theirs, (ours, default) in _NORMALIZER_OPTIONS.items()}
    kind = content.get("tokenizer_class")
    return options, None if kind is None else str(kind).removesuffix("Fast")


def _by_transformers(folder: Path) -> Any:
    """Have transformers make a ``tokenizer.json`` of older files."""
    from tokenizers import Tokenizer

    way_out = (
        "or write tokenizer.json where it works: "
        "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DependencyError(
            f"{str(folder)!r} has no tokenizer.json, and making one of its files needs transformers: "
            f'pip install "m3e-runtime[torch]" sentencepiece protobuf, {way_out}'
        ) from error
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers raises all kinds
        raise CheckpointError(
            f"transformers cannot make a tokenizer.json of the files in {str(folder)!r} ({error}). Install what it "
            f"asks for (pip install sentencepiece protobuf), {way_out}"
        ) from error


def _from_vocabulary(path: Path, options: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as a vocabulary: {error}") from error
    vocabulary = {token: i for i, token in enumerate(lines) if token}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if token not in vocabulary]
    if missing:
        raise CheckpointError(f"{str(path)!r} lacks {', '.join(missing)}: it is no BERT vocabulary")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106 (no password)
    tokenizer.add_special_tokens(
        [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in vocabulary]
    )
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
