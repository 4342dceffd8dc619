from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3e.errors import BundleError, InferenceError, InputError
from m3e.tokenizer import Tokenizer, _chunks
from m3e_export.tokenizer import read_tokenizer
from tests.datasets import stsb_sentences


@pytest.fixture(scope="module")
def tokenizer(minilm_checkpoint: Path) -> Tokenizer:
    return Tokenizer(read_tokenizer(minilm_checkpoint, 30522), 256)


@pytest.fixture(scope="module", params=["m3e", "minilm"])
def pair(request: pytest.FixtureRequest, tiny_checkpoint: Path, minilm_checkpoint: Path) -> tuple[Tokenizer, object]:
    from transformers import AutoTokenizer

    folder, vocab_size = (tiny_checkpoint, 21128) if request.param == "m3e" else (minilm_checkpoint, 30522)
    return Tokenizer(read_tokenizer(folder, vocab_size), 512), AutoTokenizer.from_pretrained(folder)


def test_ids_are_transformers_ids(pair: tuple[Tokenizer, object], sentences: list[str], data_dir: Path | None) -> None:
    ours, theirs = pair
    texts = [
        *sentences,
        "",
        " ",
        "\t\n",
        "[MASK] [PAD]",
        "\x00a\x7f",
        "ＡＢＣ１２３",
        "e\u0301",
        "a\u200db",
        "한국어",
        "𠮷野家",
    ]
    if data_dir is not None:
        texts += stsb_sentences(data_dir, "zh") + stsb_sentences(data_dir, "en")
    expected = theirs(texts, truncation=True, max_length=512)["input_ids"]  # type: ignore[operator]
    assert ours(texts).input_ids == expected


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_ids_are_transformers_ids_for_any_text(pair: tuple[Tokenizer, object], text: str) -> None:
    ours, theirs = pair
    assert ours([text]).input_ids[0] == theirs(text)["input_ids"]  # type: ignore[operator]


@pytest.mark.parametrize("max_seq_length", [3, 4, 7, 256])
def test_truncation_keeps_the_first_tokens_and_the_closing_one(minilm_checkpoint: Path, max_seq_length: int) -> None:
    data = read_tokenizer(minilm_checkpoint, 30522)
    full = Tokenizer(data, 10_000)(["word " * 300])
    cut = Tokenizer(data, max_seq_length)(["word " * 300])
    ids = full.input_ids[0]
    assert cut.input_ids[0] == ids[: max_seq_length - 1] + ids[-1:]
    assert (cut.n_tokens.tolist(), cut.n_tokens_full.tolist()) == ([max_seq_length], [302])


def test_more_texts_than_a_chunk(tokenizer: Tokenizer) -> None:
    texts = [f"text {i}" for i in range(5000)]
    tokens = tokenizer(texts)
    assert tokens.input_ids[4321] == tokenizer([texts[4321]]).input_ids[0]
    assert tokens.n_tokens.tolist() == [len(ids) for ids in tokens.input_ids]


def test_a_lone_surrogate_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="text 2 is not valid Unicode: lone surrogate at character 1"):
        tokenizer(["a", "b", "c\udfff"])


def test_a_lone_surrogate_is_named_behind_the_cut_too(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="text 1 is not valid Unicode: lone surrogate at character 90000"):
        tokenizer(["a", "word " * 18_000 + "\udfff"])


def test_a_text_cut_early_has_the_ids_of_the_whole(tokenizer: Tokenizer, minilm_checkpoint: Path) -> None:
    text = "word, " * 20_000
    tokens = tokenizer(["a", text])
    whole = Tokenizer(read_tokenizer(minilm_checkpoint, 30522), 100_000)([text])
    assert whole.n_tokens.tolist() == tokenizer.count([text]).tolist() == [40_002]
    assert tokens.input_ids[1] == whole.input_ids[0][:255] + whole.input_ids[0][-1:]
    assert 256 < tokens.n_tokens_full[1] < 300


def test_a_panic_of_tokenizers_is_an_error_of_ours(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it: no Exception."""

    class Panics:
        def __init__(self, error: type[BaseException]) -> None:
            self.error = error

        def encode_batch_fast(self, texts: list[str]) -> None:
            raise self.error("the global thread pool has not been initialized")

    monkeypatch.setattr(tokenizer, "_tokenizer", Panics(PanicException))
    with pytest.raises(InferenceError, match="tokenizers failed on 1 texts: the global thread pool"):
        tokenizer(["a"])
    monkeypatch.setattr(tokenizer, "_tokenizer", Panics(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokenizer(["a"])


def test_no_tokenizer() -> None:
    with pytest.raises(BundleError, match=r"tokenizer.json cannot be read"):
        Tokenizer(b'{"model": 3}', 10)


def test_texts_are_tokenised_in_bounded_chunks() -> None:
    rng = random.Random(0)
    texts = ["天" * rng.choice((0, 1, 10, 100_000, 400_000)) for _ in range(200)] + ["a"] * 5000
    chunks = list(_chunks(texts))
    assert [text for chunk in chunks for text in chunk] == texts
    for chunk in chunks:
        assert 1 <= len(chunk) <= 2048
        assert len(chunk) == 1 or sum(map(len, chunk)) <= 1 << 18
