"""A ``tokenizer.json`` before the library tokenizers sees it: what it may do to a text, and which ids it may give.

The library knows steps that cost what their author likes: a regular expression runs in a backtracking engine, a
replacement may make a megabyte of a letter, and an id need not be one of the model's. So the kinds of steps are listed;
a regular expression is made as those of published tokenizers are, which takes time quadratic in a text at worst; no
text grows more than a few times; and every id has a row in the model's table of embeddings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from m3e.errors import BundleError

# What tokenizers 0.23 knows and an encoder may have, by the part's name.
_TYPES = {
    "normalizer": {"BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled",
                   "Prepend", "Replace", "Strip", "StripAccents"},
    "pre_tokenizer": {"BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation",
                      "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"},
    "model": {"BPE", "Unigram", "WordLevel", "WordPiece"},
    "post_processor": {"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"},
    "decoder": {"BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"},
}  # fmt: skip
_INNER = ("normalizers", "pretokenizers", "processors", "decoders")
_MOST_STEPS = 32
# What all replacements of a part together may make of a character.
_MOST_GROWTH = 16
# BERT's is 100; the time for a word grows with its square.
_LONGEST_WORD = 200
# Around a text: [CLS] and [SEP], and what instructions and languages need.
_MOST_SPECIAL_TOKENS = 8

# A regular expression, by what its parts are: A a character or a class, Q one with ``?``, N one with a count, M one
# repeated without bound, B ... E a group and B ... F one with ``?``, I the bar between alternatives.
_LONGEST_EXPRESSION = 1000
_ATOM = (
    r"(?:\\[pP]\{\^?\w+\}|\\x\{[\dA-Fa-f]+\}|\\x[\dA-Fa-f]{2}|\\u[\dA-Fa-f]{4}|\\[AbBdDhHnrsStvwWzZ]|\\[^\w\s]"
    r"|\[(?:\\.|\[[^\[\]]*\]|[^\\\[\]])+\]|[^\\\[\](){}|*+?])"
)
_PARTS = re.compile(
    rf"(?P<M>{_ATOM}(?:[*+][?+]?|\{{\d,\}}))|(?P<Q>{_ATOM}\?[?+]?)|(?P<N>{_ATOM}\{{\d(?:,\d)?\}})|(?P<A>{_ATOM})"
    r"|(?P<B>\((?:\?(?:i?:|<?[=!]))?)|(?P<F>\)\?)|(?P<E>\))|(?P<I>\|)"
)
# Such as GPT-4's ``[^\r\n\p{L}\p{N}]?\p{L}+`` (QM), ``[^\s\p{L}\p{N}]+[\r\n]*`` (MM) and ``\s+(?!\S)`` (MBAE). No group
# is repeated, there are few choices, and nothing can fail behind a second M: that would be time cubic in the text.
_ALTERNATIVE = "A*[QN]{0,2}A*(?:B[AI]*[EF]A*|MA*(?:M(?:Q|B[AI]*F)?|[QN]A*|BA*[EF]A*)?)?"
_EXPRESSION = re.compile(f"{_ALTERNATIVE}(?:I{_ALTERNATIVE})*")


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
        return ["it has no model, expected an object that is one"]
    problems = []
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        try:
            steps = list(_steps(content.get(part)))
        except (TypeError, RecursionError):
            problems.append(f"{part} is {content.get(part)!r:.60}, expected a step or a sequence of steps")
            continue
        if len(steps) > _MOST_STEPS:
            problems.append(f"{part} has {len(steps)} steps, expected at most {_MOST_STEPS}")
            continue
        problems += [problem for step in steps for problem in _step_problems(part, step, vocab_size)]
        if (growth := math.prod(map(_growth, steps))) > _MOST_GROWTH:
            problems.append(f"{part} makes texts up to {growth} times as long, expected at most {_MOST_GROWTH} times")
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
        regex, string = _pattern(step)
        if regex is None and not string:
            yield f"{part} {kind} has the pattern {step.get('pattern')!r:.60}, expected a String or a Regex"
        elif regex is not None and not _is_plain(regex):
            yield (
                f"{part} {kind} has the regular expression {regex:.80}, expected alternatives of characters, classes "
                "and repeated classes"
            )
    if kind == "TemplateProcessing":
        single, specials = step.get("single"), step.get("special_tokens")
        if not isinstance(single, list) or len(single) > _MOST_SPECIAL_TOKENS + 1:
            yield (
                f"{part} has the template {single!r:.60}, expected a list of at most {_MOST_SPECIAL_TOKENS} special "
                "tokens and the text"
            )
        tokens = list(specials.values()) if isinstance(specials, dict) else [specials]
        ids = [token.get("ids") if isinstance(token, dict) else None for token in tokens]
        if not all(isinstance(one, list) and len(one) == 1 and _is_id(one[0], vocab_size) for one in ids):
            yield f"{part} has the special tokens' ids {ids!r:.60}, expected for each a list of one below {vocab_size}"
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
    vocabulary: Any = model.get("vocab")
    try:
        missing = {token["content"] for token in added} - {""}
        if isinstance(vocabulary, dict):
            ids, missing = list(vocabulary.values()), missing - vocabulary.keys()
        else:
            ids, missing = list(range(len(vocabulary))), missing - {token for token, _ in vocabulary}
        # Added tokens that the vocabulary lacks are numbered from its end, whatever the file says of their ids.
        largest = max([*ids, len(ids) + len(missing) - 1])
    except (TypeError, KeyError, ValueError):
        yield f"model has the vocabulary {vocabulary!r:.60}, expected tokens and their ids"
        return
    if not ids:
        yield "model has an empty vocabulary, expected at least one token"
    if not all(map(_is_number, ids)) or largest >= vocab_size:
        yield f"it has ids up to {largest}, the model has {vocab_size} word embeddings: expected ids below that"


def _pattern(step: dict[str, Any]) -> tuple[str | None, str | None]:
    """The regular expression or the string that a step looks for."""
    pattern = step.get("pattern")
    found = (pattern.get("Regex"), pattern.get("String")) if isinstance(pattern, dict) else (None, pattern)
    regex, string = (each if isinstance(each, str) else None for each in found)
    return regex, string


def _is_plain(expression: str) -> bool:
    parts = _PARTS.sub(lambda part: part.lastgroup or "", expression[: _LONGEST_EXPRESSION + 1])
    return len(expression) <= _LONGEST_EXPRESSION and _EXPRESSION.fullmatch(parts) is not None


def _growth(step: dict[str, Any]) -> int:
    """How many characters a step may make of one."""
    if step.get("type") == "Prepend":
        return 1 + len(str(step.get("prepend")))
    if step.get("type") != "Replace":
        return 1
    return max(1, -(-len(str(step.get("content"))) // len(_pattern(step)[1] or "-")))


def _is_id(value: Any, vocab_size: int) -> bool:
    return _is_number(value) and value < vocab_size


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 0
