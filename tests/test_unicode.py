"""Token ids of every Unicode scalar value, against transformers and against digests of earlier runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from m3e.tokenizer import Tokenizer
from m3e_export.tokenizer import read_tokenizer

CONTEXTS = ("{c}", "中{c}文", "a{c}b", "{c}{c}", "a {c}", "{c}\u0301")
# sha256, cut to 16 digits, of the ids of all-MiniLM-L6-v2's tokenizer, by the version of tokenizers: of the sample and
# of all. A new version is added once the long test has shown its digests; other digests than these mean that upgrading
# changes users' vectors.
DIGESTS = {
    "0.21.0": ("a3af3e2b5721e7b9", "9f716835f6854652"),
    "0.21.4": ("a3af3e2b5721e7b9", "9f716835f6854652"),
    "0.22.2": ("a3af3e2b5721e7b9", "9f716835f6854652"),
    "0.23.3": ("a3af3e2b5721e7b9", "9f716835f6854652"),
}
SAMPLE, ALL = DIGESTS["0.23.3"]


def scalars(step: int) -> list[str]:
    return [chr(code) for code in range(0, 0x110000, step) if not 0xD800 <= code < 0xE000]


def batches(step: int) -> Iterator[list[str]]:
    """Texts of all contexts, some 24,000 at a time."""
    characters = scalars(step)
    for start in range(0, len(characters), 4096):
        yield [context.format(c=c) for c in characters[start : start + 4096] for context in CONTEXTS]


def digest_of(tokenizer: Tokenizer, step: int) -> str:
    digest = hashlib.sha256()
    for texts in batches(step):
        for ids in tokenizer(texts).input_ids:
            digest.update(np.array([len(ids), *ids], dtype="<u4").tobytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="module")
def minilm(minilm_checkpoint: Path) -> Tokenizer:
    return Tokenizer(read_tokenizer(minilm_checkpoint, 30522), 512)


def test_the_ids_of_a_sample_are_frozen(minilm: Tokenizer) -> None:
    """A step of 61, a prime, leaves 18,000 characters of all blocks, in six contexts."""
    assert digest_of(minilm, 61) == SAMPLE


@pytest.mark.soak
@pytest.mark.parametrize("folder", ["minilm_checkpoint", "tiny_checkpoint"])
def test_the_ids_of_every_character_are_transformers_ids(
    folder: str, request: pytest.FixtureRequest, record_property: Callable[[str, str], None]
) -> None:
    from transformers import AutoTokenizer

    checkpoint: Path = request.getfixturevalue(folder)
    ours = Tokenizer(read_tokenizer(checkpoint, 30522), 512)
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    n_texts = 0
    for texts in batches(1):
        expected = theirs(texts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        actual = ours(texts).input_ids
        assert actual == expected, next(text for text, a, b in zip(texts, actual, expected, strict=True) if a != b)
        n_texts += len(texts)
    assert n_texts == 6 * 1_112_064
    record_property("A4", f"{n_texts:,} of {n_texts:,}, {folder.removesuffix('_checkpoint')}")


@pytest.mark.long
def test_the_ids_of_every_character_are_frozen(minilm: Tokenizer) -> None:
    assert digest_of(minilm, 1) == ALL
    assert DIGESTS.get(tokenizers.__version__) == (SAMPLE, ALL), "add this version"
