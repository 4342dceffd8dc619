"""Texts that hurt: mutations of real lines, and hypothesis' strategies of the same alphabets."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from hypothesis import strategies as st

from m3e_export.texts import corpus

# Where tokenizers, normalisers and C strings break.
PIECES = (
    "\0", "\x01", "\x7f", "\x1c", "\x85", "\xa0", "\u3000", "\u200b", "\u200d", "\u2028", "\ufeff", "\ufffd", "\uffff",
    "\U0010ffff", "\ue000", "\u0378", "\ud800", "\udbff", "\udc00", "\udfff", "\ud83d\ude00", "\u0301", "\u20e3",
    "\u1b44", "\ufe0f", "\U000e0041", "\u202e", "\u2066", "\u2069", "שלום", "مرحبا", "ﷺ", "😀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇳",
    "\U00020000", "\U0002b820", "\U00030000", "\U000323af", "豈", "ｱ", "Ａ", "Σ", "İ", "ﬁ", "½", "각", "각",
    "[PAD]", "[MASK]", "[UNK]", "[CLS]", "[SEP]", "[unused1]", "[PAD", "<s>", "%s%n", "{}", "\\u0000", "\r\n", "\t",
)  # fmt: skip
_NOTHING = ("", " ", "\u3000", "\u200b", "\0", "\u0301", "\ufe0f", " " * 30_000)
_LONG_BYTES = 10_000_000
_ONE_LONG_IN = 1000
_LONGEST = 20_000  # characters of the others


def mutations(seed: int, count: int) -> Iterator[str]:
    """Make texts from lines of the shipped corpus; one in a thousand has ten megabytes."""
    rng = random.Random(seed)
    lines = [*corpus("zh"), *corpus("en")]
    for i in range(count):
        if (i + seed) % _ONE_LONG_IN == _ONE_LONG_IN - 1:
            yield _flood(rng)
            continue
        if rng.random() < 0.04:
            yield rng.choice(_NOTHING)
            continue
        text = rng.choice(lines)
        for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
            text = rng.choice(_MUTATIONS)(rng, text, lines)[:_LONGEST]
        yield text


def _flood(rng: random.Random) -> str:
    piece = "".join(rng.choices([piece for piece in PIECES if piece.isprintable()] + ["汉", "a", " "], k=2))
    return piece * (_LONG_BYTES // len(piece.encode("utf-8", "replace")))


def _insert(rng: random.Random, text: str, _: list[str]) -> str:
    place = rng.randint(0, len(text))
    return text[:place] + rng.choice(PIECES) * rng.choice((1, 1, 2, 30)) + text[place:]


def _replace(rng: random.Random, text: str, _: list[str]) -> str:
    place = rng.randint(0, len(text))
    return text[:place] + chr(rng.randrange(0x110000)) + text[place + 1 :]


def _cut(rng: random.Random, text: str, _: list[str]) -> str:
    start, stop = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    return text[:start] + text[stop:]


def _join(rng: random.Random, text: str, lines: list[str]) -> str:
    return text + rng.choice((*PIECES, "")) + rng.choice(lines)


def _repeat(rng: random.Random, text: str, _: list[str]) -> str:
    return text * int(2 ** rng.uniform(0, 8))


def _bomb(rng: random.Random, text: str, _: list[str]) -> str:
    """Thousands of combining marks on one letter."""
    place = rng.randint(0, len(text))
    return text[:place] + "".join(rng.choices("\u0300\u0301\u0323\u0345\u1ab0\u20d0\u302a", k=2000)) + text[place:]


def _shuffle(rng: random.Random, text: str, _: list[str]) -> str:
    return "".join(rng.sample(text, len(text)))


def _of_all_unicode(rng: random.Random, text: str, _: list[str]) -> str:
    return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(0, 64))) + text[:8]


def _misread(rng: random.Random, text: str, _: list[str]) -> str:
    """Bytes read with the wrong encoding, as scraped pages have it."""
    data = text.encode("utf-8", "replace")
    return data.decode(rng.choice(("latin-1", "gb18030", "utf-16-le", "cp1252")), rng.choice(("replace", "ignore")))


_MUTATIONS: tuple[Callable[[random.Random, str, list[str]], str], ...] = (
    _insert, _insert, _replace, _cut, _join, _repeat, _bomb, _shuffle, _of_all_unicode, _misread,
)  # fmt: skip

# Lone surrogates too: `st.characters` leaves them out unless they are asked for.
TEXTS: st.SearchStrategy[str] = st.one_of(
    st.text(st.characters(exclude_categories=[]), max_size=200),
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.tuples(st.sampled_from(PIECES), st.integers(0, 20_000)).map(lambda pair: (pair[0] * pair[1])[:20_000]),
)
