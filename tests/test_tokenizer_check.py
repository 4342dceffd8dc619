"""The check of a tokenizer.json lets every published kind pass, and no step whose cost its author chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from m3e import BundleError, InferenceError
from m3e.tokenizer import Tokenizer
from m3e.tokenizer_check import check_tokenizer, tokenizer_problems
from m3e_export.tokenizer import read_tokenizer

# Regular expressions of published tokenizers.
PUBLISHED = {
    "GPT-2, RoBERTa": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "CLIP": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "GPT-4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
             r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "Llama 3, EuroBERT": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                         r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "Qwen 2, Qwen 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                      r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "GPT-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
              r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
              r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "DeepSeek-V3": r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
                   r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "DeepSeek-V3, CJK": "[一-龥぀-ゟ゠-ヿ]+",
    "BLOOM": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "XLM-R": " {2,}",
    "DeBERTa": r"\s{2,}|[\n\r\t]",
    "SeamlessM4T": "^▁+$",
    "words": r"\b\w+\b|[^\w\s]",
}  # fmt: skip
COSTLY = (
    "(a+)+$", "(a|a)*b", "(a*)*", "(?:a?){9}", r"(a)\1", r"(?<x>a)\g<x>", r"\w+\w+!", r"\w+\w+(?!\w)", r"a*b*c*",
    "a?a?a?a?a", "(a|a)(a|a)(a|a)b", "a{99}", "a+*", "a{2}{2}", "((a))", "(?~a)", "(?(?=a)b|c)", "a" * 1001, "[a", "a)",
)  # fmt: skip
VOCABULARY = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##b"))}


def content(**parts: Any) -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    return {**json.loads(tokenizer.to_str()), **parts}


def split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_expression_passes(name: str) -> None:
    data = content(pre_tokenizer={"type": "Sequence", "pretokenizers": [split(PUBLISHED[name])]})
    assert tokenizer_problems(data, 6) == []
    Tokenizer(json.dumps(data).encode(), 512)(["a word, 一个词  \n 123's"])


@pytest.mark.parametrize("expression", COSTLY)
def test_a_costly_expression_is_refused(expression: str) -> None:
    (problem,) = tokenizer_problems(content(pre_tokenizer=split(expression)), 6)
    assert problem.startswith("pre_tokenizer Split has the regular expression")


@pytest.mark.parametrize(
    "name",
    ["AlbertTokenizer", "BertTokenizer", "BigBirdTokenizer", "CamembertTokenizer", "DebertaV2Tokenizer",
     "GemmaTokenizer", "LlamaTokenizer", "MBartTokenizer", "NllbTokenizer", "Qwen2Tokenizer", "RobertaTokenizer",
     "T5Tokenizer", "XLMRobertaTokenizer"],
)  # fmt: skip
def test_what_transformers_builds_passes(name: str) -> None:
    tokenizer: Any = getattr(transformers, name)()
    assert tokenizer_problems(json.loads(tokenizer.backend_tokenizer.to_str()), len(tokenizer)) == []


@given(
    ids=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    added=st.lists(st.tuples(st.text("abxyz", max_size=2), st.integers(0, 20)), max_size=8),
    unigram=st.booleans(),
)
def test_the_largest_id_is_the_librarys(ids: list[int], added: list[tuple[str, int]], unigram: bool) -> None:
    tokens = ["[UNK]", "a", "b", "x", "aa", "ab", "y", "z"][: len(ids)]
    data = content(
        added_tokens=[
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for token, i in added
        ]
    )  # fmt: skip
    if unigram:
        data["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[token, 0.0] for token in tokens]}
    else:
        data["model"]["vocab"] = dict(zip(tokens, ids, strict=True))
    try:
        vocabulary = tokenizers.Tokenizer.from_str(json.dumps(data)).get_vocab(with_added_tokens=True)
    except Exception:
        return
    # The library counts on from the number of tokens; where ids are there twice, that is more than the largest.
    largest = max(max(vocabulary.values()), len(tokens) - 1)
    assert any("ids up to" in problem for problem in tokenizer_problems(data, largest))
    assert tokenizer_problems(data, largest + 1) == []


def test_a_replacement_may_be_longer_but_not_much() -> None:
    def replace(text: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": {"String": "…"}, "content": text}

    assert tokenizer_problems(content(normalizer=replace("...")), 6) == []
    steps = [replace("." * 4), replace("." * 4), replace("." * 4)]
    (problem,) = tokenizer_problems(content(normalizer={"type": "Sequence", "normalizers": steps}), 6)
    assert problem == "normalizer makes texts up to 64 times as long, expected at most 16 times"


@pytest.mark.parametrize("charsmap", ["", "AQA=", "BAAAAP////8="])
def test_a_panic_of_the_library_is_an_error(tmp_path: Path, charsmap: str) -> None:
    """A map that no SentencePiece wrote panics in Rust, which no ``except Exception`` sees."""
    data = json.dumps(content(normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap})).encode()
    check_tokenizer(data, 6)
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(data, 512)


def test_a_word_that_no_token_stands_for_is_an_error() -> None:
    data = content()
    data["model"]["vocab"] = {"a": 0}
    with pytest.raises(InferenceError, match=r"tokenizers failed on 1 texts: .*UNK"):
        Tokenizer(json.dumps(data).encode(), 512)(["x"])


def test_a_checkpoints_panic_is_an_error(tmp_path: Path) -> None:
    from m3e import CheckpointError

    data = content(normalizer={"type": "Precompiled", "precompiled_charsmap": ""})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        read_tokenizer(tmp_path, 6)
