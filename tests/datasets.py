"""The public evaluation sets that some tests read, where M3E_DATA_DIR says they lie."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path


def stsb_sentences(data_dir: Path, language: str) -> list[str]:
    """Both sentences of every pair of the STS-B test set, ``zh`` or ``en``."""
    if language == "zh":
        lines = (data_dir / "zh-stsb-test.tsv").read_text(encoding="utf-8").splitlines()
        return [sentence for line in lines for sentence in line.split("\t")[:2]]
    return [sentence for pair in stsb_pairs(data_dir) for sentence in pair[:2]]


def stsb_pairs(data_dir: Path) -> list[tuple[str, str, float]]:
    """The pairs of the English STS-B test set, with their scores."""
    with gzip.open(data_dir / "en-stsb.tsv.gz", "rt", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence1"], row["sentence2"], float(row["score"])) for row in rows if row["split"] == "test"]
