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
    with gzip.open(data_dir / "en-stsb.tsv.gz", "rt", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [row[key] for row in rows if row["split"] == "test" for key in ("sentence1", "sentence2")]
