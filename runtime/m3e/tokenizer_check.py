"""A ``tokenizer.json`` before the library tokenizers sees it: made of what real encoders' tokenizers are made of.

The library compiles any regular expression with a backtracking engine, repeats any replacement, and gives any id. So
the kinds of steps are listed, the regular expressions are those of published tokenizers, to the letter, no step makes
a text longer, and every id has a row in the model's table of embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from m3e.errors import BundleError

# What BERT's and RoBERTa's families, XLM-R's SentencePiece, DeBERTa, ALBERT and ModernBERT have, by the part's name.
_TYPES = {
    "normalizer": {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Precompiled", "Replace", "Strip",
                   "StripAccents"},
    "pre_tokenizer": {"BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "Whitespace",
                      "WhitespaceSplit"},
    "model": {"BPE", "Unigram", "WordPiece"},
    "post_processor": {"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"},
    "decoder": {"BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"},
}  # fmt: skip
_INNER = ("normalizers", "pretokenizers", "processors", "decoders")
# Of transformers' converters of SentencePiece models, and of DeBERTa-v2; each takes time linear in the text.
_PATTERNS = {" {2,}", r"\s{2,}|[\n\r\t]"}
_MOST_STEPS = 32
# BERT's is 100; the time for a word grows with its square.
_LONGEST_WORD = 200
# The template's pieces of one text: [CLS], the text and [SEP].
_MOST_PIECES = 3


def check_tokenizer(data: bytes, vocab_size: int) -> None:
    """Refuse a ``tokenizer.json`` that is not made of what real encoders' tokenizers are made of.

    Args:
        data: The file.
        vocab_size: Rows of the word embeddings; every token id must be smaller.

    Raises:
        BundleError: Every problem found, with the part that has it.
    """
    try:
        content = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"tokenizer.json cannot be read: {error}") from error
    if problems := tokenizer_problems(content, vocab_size):
        raise BundleError(
            f"tokenizer.json is refused before it is opened: {'; '.join(problems)}; convert the checkpoint again"
        )


def tokenizer_problems(content: Any, vocab_size: int) -> list[str]:
    """Say what is wrong with the content of a ``tokenizer.json``; nothing where it may be opened."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        return ["it has no model"]
    problems = []
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        try:
            steps = list(_steps(content.get(part)))
        except (TypeError, RecursionError):
            problems.append(f"{part} is no step and no sequence of steps")
            continue
        if len(steps) > _MOST_STEPS:
            problems.append(f"{part} has {len(steps)} steps, expected at most {_MOST_STEPS}")
        problems += [problem for step in steps[:_MOST_STEPS] for problem in _step_problems(part, step, vocab_size)]
    return [*problems, *_model_problems(model, content.get("added_tokens") or [], vocab_size)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two, Python and the library need not take the same."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if not isinstance(part, dict):
        raise TypeError
    if part.get("type") != "Sequence":
        yield part
        return
    for name in _INNER:
        for inner in part.get(name) or ():
            yield from _steps(inner)


def _step_problems(part: str, step: dict[str, Any], vocab_size: int) -> Iterator[str]:
    kind = step.get("type")
    if not isinstance(kind, str) or kind not in _TYPES[part]:
        yield f"{part} {kind!r:.60} is not supported, expected {', '.join(sorted(_TYPES[part]))}"
        return
    if kind in ("Split", "Replace"):
        pattern, content = step.get("pattern"), step.get("content", "")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        string = pattern.get("String") if isinstance(pattern, dict) else pattern
        if regex is not None and (not isinstance(regex, str) or regex not in _PATTERNS):
            yield f"{part} {kind} has the regular expression {regex!r:.60}, expected one of {sorted(_PATTERNS)}"
        elif regex is None and not (isinstance(string, str) and string):
            yield f"{part} {kind} has no pattern"
        longest = 1 if regex is not None else len(string or "")
        if not isinstance(content, str) or len(content) > longest:
            yield f"{part} {kind} makes texts longer: it puts {content!r:.60} for each {pattern!r:.60}"
    if kind == "TemplateProcessing":
        single, specials = step.get("single"), step.get("special_tokens")
        if not isinstance(single, list) or len(single) > _MOST_PIECES:
            yield f"{part} puts more than {_MOST_PIECES - 1} special tokens around a text"
        tokens = list(specials.values()) if isinstance(specials, dict) else [specials]
        ids = [token.get("ids") if isinstance(token, dict) else None for token in tokens]
        if not all(isinstance(one, list) and len(one) == 1 and _is_id(one[0], vocab_size) for one in ids):
            yield f"{part} has other ids than one of {vocab_size} for each special token"
    if kind in ("BertProcessing", "RobertaProcessing"):
        for name in ("sep", "cls"):
            token = step.get(name)
            if not (isinstance(token, list) and len(token) == 2 and _is_id(token[1], vocab_size)):
                yield f"{part} {kind} has {name} {token!r:.60}, expected a token and its id below {vocab_size}"


def _model_problems(model: dict[str, Any], added: Any, vocab_size: int) -> Iterator[str]:
    # Files of 2020 do not name the model's type.
    kind = model.get("type")
    if "type" in model and (not isinstance(kind, str) or kind not in _TYPES["model"]):
        yield f"model {kind!r:.60} is not supported, expected {', '.join(sorted(_TYPES['model']))}"
    if model.get("dropout"):
        yield f"model has a dropout of {model['dropout']!r:.60}: a text would have other tokens each time"
    longest = model.get("max_input_chars_per_word", 0)
    if not isinstance(longest, int) or not 0 <= longest <= _LONGEST_WORD:
        yield f"model has max_input_chars_per_word {longest!r:.60}, expected at most {_LONGEST_WORD}"
    vocabulary = model.get("vocab")
    try:
        by_token = vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}
        # Added tokens that the vocabulary lacks are numbered from its end, whatever the file says of their ids.
        contents = {token["content"] for token in added} - {""}
        ids = list(by_token.values())
        last = max([len(vocabulary) - 1, *(by_token[token] for token in contents & by_token.keys())])
        largest = max([*ids, last + len(contents - by_token.keys())])
    except (TypeError, KeyError, ValueError):
        yield "model has no vocabulary of tokens and ids"
        return
    if not ids:
        yield "model has an empty vocabulary"
    if not all(map(_is_number, ids)) or largest >= vocab_size:
        yield f"it has ids up to {largest}, the model has {vocab_size} word embeddings"


def _is_id(value: Any, vocab_size: int) -> bool:
    return _is_number(value) and value < vocab_size


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 0
