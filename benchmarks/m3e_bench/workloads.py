"""The texts: workloads for speed, labelled pairs and retrieval for accuracy.

With a data folder (``--data`` or M3E_DATA_DIR) the public sets that lie there; without one, the corpus that ships
with the exporter.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m3e import InputError
from m3e_export.texts import corpus

PEERS_BATCH = 32  # sentence-transformers' default


@dataclass(frozen=True, slots=True)
class Workload:
    """Texts under a name.

    Attributes:
        name: In records.
        texts: In the order in which they are encoded.
        source: Where they come from, for the reader of a record.
    """

    name: str
    texts: tuple[str, ...]
    source: str

    @property
    def sha256(self) -> str:
        """Hash of the texts, so that two records can be told to have used the same."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Pairs:
    """Labelled pairs: ``scores`` grow with similarity."""

    name: str
    left: tuple[str, ...]
    right: tuple[str, ...]
    scores: tuple[float, ...]


def speed_workloads(data: Path | None) -> list[Workload]:
    """Short questions, and texts of every length up to the model's."""
    if data is None:
        rng = np.random.default_rng(0)
        lines = corpus("zh")
        short = tuple(line for line in lines if len(line) <= 40)[:500]
        mixed = []
        for length in rng.choice([8, 12, 16, 24, 32, 64, 128, 256, 500], 200):
            start = int(rng.integers(len(lines) - 40))
            mixed.append("".join(lines[start : start + 40])[: int(length)])
        return [
            Workload("corpus-short", short, "the exporter's corpus, Chinese sentences of at most 40 characters"),
            Workload("corpus-mixed", tuple(mixed), "the exporter's corpus, joined and cut to 8 to 500 characters"),
        ]
    questions = [left for left, _, _ in _tsv(data / "zh-lcqmc-test.tsv")]
    short_texts = questions + [text for row in _tsv(data / "zh-stsb-test.tsv") for text in row[:2]]
    long_texts = [row[key] for row in _jsonl(data / "zh-sohu-dc-test.jsonl") for key in ("sentence1", "sentence2")]
    pool = short_texts + long_texts
    weights = np.array([1.0] * len(short_texts) + [4.0] * len(long_texts))
    chosen = np.random.default_rng(0).choice(len(pool), 500, replace=False, p=weights / weights.sum())
    return [
        Workload("lcqmc", tuple(questions[:2000]), "LCQMC test, the first 2000 questions"),
        Workload(
            "mixed", tuple(pool[i] for i in chosen),
            "500 texts from LCQMC and STS-B test and SOHU 2021 (weighted 4:1), numpy default_rng(0)",
        ),
    ]  # fmt: skip


def every_nth_batch(texts: Sequence[str], n: int) -> tuple[str, ...]:
    """Cut a workload down to a part of itself that costs every engine its share.

    The peers sort by length and pad batches of 32. Fewer texts drawn at random would make batches of more unlike
    lengths, and the padding would cost more than it does in the whole. So whole batches of the sorted texts are kept,
    every n-th of them; their texts are shuffled, since not every engine sorts.
    """
    if n == 1:
        return tuple(texts)
    ordered = sorted(texts, key=len, reverse=True)
    batches = [ordered[start : start + PEERS_BATCH] for start in range(0, len(ordered), PEERS_BATCH)]
    kept = [text for batch in batches[n // 2 :: n] for text in batch]
    return tuple(kept[i] for i in np.random.default_rng(0).permutation(len(kept)))


def sized_texts(length: int, count: int, seed: int = 0) -> tuple[str, ...]:
    """Texts of one length in tokens: a Chinese character is one token in BERT's vocabularies, [CLS] and [SEP] two."""
    characters = "".join(c for line in corpus("zh") for c in line if "\u4e00" <= c <= "\u9fff")
    starts = np.random.default_rng(seed).integers(0, len(characters) - length, count)
    return tuple(characters[start : start + length - 2] for start in starts)


def labelled_pairs(data: Path | None, language: str, limit: int | None) -> list[Pairs]:
    """Sets of labelled pairs in a language, ``zh`` or ``en``; none without data."""
    if data is None:
        return []
    if language == "en":
        with gzip.open(data / "en-stsb.tsv.gz", "rt", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows = [(row["sentence1"], row["sentence2"], row["score"]) for row in reader if row["split"] == "test"]
        return [_pairs("en-stsb", rows, limit)]
    return [
        _pairs("zh-stsb", _tsv(data / "zh-stsb-test.tsv"), limit),
        _pairs("zh-lcqmc", _tsv(data / "zh-lcqmc-test.tsv"), 2000 if limit is None else limit),
    ]


def accuracy_texts(language: str, limit: int | None) -> tuple[str, ...]:
    """Texts of a language from the exporter's corpus, for cosines where nothing is labelled."""
    lines = corpus(language)
    return tuple(lines[:: max(1, len(lines) // (limit or 1000))])


def data_hashes(data: Path | None) -> dict[str, str]:
    """SHA-256 of every file of the data folder, so that a record says what it read."""
    if data is None:
        return {}
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(data.iterdir())
        if path.suffix in (".tsv", ".jsonl", ".gz")
    }


def check_data(folder: Path) -> Path:
    """Refuse a data folder that lacks a set, naming all that it lacks."""
    names = ("zh-lcqmc-test.tsv", "zh-stsb-test.tsv", "zh-sohu-dc-test.jsonl", "en-stsb.tsv.gz")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"the data folder {str(folder)!r} lacks {', '.join(missing)}")
    return folder


def _pairs(name: str, rows: Sequence[Sequence[str]], limit: int | None) -> Pairs:
    kept = rows[:limit]
    return Pairs(
        name, tuple(row[0] for row in kept), tuple(row[1] for row in kept), tuple(float(row[2]) for row in kept)
    )


def _tsv(path: Path) -> list[tuple[str, str, str]]:
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [(row[0], row[1], row[2]) for row in rows]


def _jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
