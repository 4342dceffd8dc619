"""The texts that a bundle is measured on: written for this project, of many registers and every length."""

from __future__ import annotations

import functools
import itertools
from importlib import resources

# Short, so that they cost little at every start, and different enough that a wrong mask, pooling, position,
# weight or tokenizer shows in one of them.
GOLDEN_TEXTS = (
    "",
    "好",
    "今天天气真好，我们去公园散步吧。",
    "How do I reset my password?",
    "M3E 是 Moka Massive Mixed Embedding 的缩写，支持中英双语。",
    "𠮷野家の牛丼 🍜 café 100％ ２０２４年",
    "合同约定的交货日期为3月15日，逾期每日按货款总额的万分之五支付违约金。",
    "The quick brown fox jumps over the lazy dog while 12,345 people watch on https://example.com/a?b=c.",
)

_LENGTHS = (1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@functools.cache
def corpus(language: str) -> tuple[str, ...]:
    """The texts of a language that ship with the exporter: ``zh`` or ``en``."""
    return tuple(
        resources.files("m3e_export").joinpath("corpus", f"{language}.txt").read_text("utf-8").strip("\n").split("\n")
    )


def certificate_texts() -> list[str]:
    """The golden texts, natural sentences, and texts from one word or character to past 512 tokens in both languages.

    A Chinese character is about one token and an English word about one and a half, so the longest ones are cut.
    """
    texts = list(GOLDEN_TEXTS)
    for language in ("zh", "en"):
        lines = corpus(language)
        texts += lines[:: len(lines) // 20][:20]
        separator = "" if language == "zh" else " "
        for n, length in enumerate(_LENGTHS):
            start = len(lines) * n // len(_LENGTHS)
            joined = separator.join(itertools.islice(itertools.cycle(lines[start:]), 0, 300))
            texts.append(joined[:length] if language == "zh" else " ".join(joined.split()[:length]))
    return texts


def range_texts() -> list[str]:
    """Short natural texts of both languages, to measure the range of each dimension on."""
    short = [[line for line in corpus(language) if len(line) <= 60] for language in ("zh", "en")]
    return [text for lines in short for text in lines[:: max(1, len(lines) // 150)]]
