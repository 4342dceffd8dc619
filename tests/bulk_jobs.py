"""Jobs of `m3e embed` for the tests: texts, a call, and what came out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset

from m3e import Encoder
from m3e.bulk.embed import Summary, embed
from m3e.bulk.inputs import Input
from m3e.bulk.records import Fields
from m3e.bulk.vectors import VectorOptions, VectorSource

FORMS = ["folder", "vectors.parquet", "vectors.npy", "vectors.jsonl"]
COMMAND = "from m3e.cli.main import main; raise SystemExit(main())"


def short_texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(rng.randint(1, 12))) for _ in range(n)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(
    source: Path | str,
    output: Path,
    encoder: Encoder,
    *,
    keep: tuple[str, ...] = (),
    text: str = "text",
    format_: str | None = None,
    options: VectorOptions = VectorOptions(),  # noqa: B008 (frozen)
    **rest: Any,
) -> Summary:
    return embed(Input(str(source), format_), output, VectorSource(encoder, options), Fields(text, keep), **rest)


def read(output: Path) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Row numbers and vectors of any form of output."""
    if output.suffix == ".npy":
        return np.load(f"{output}.rows.npy").tolist(), np.load(output, mmap_mode="r")
    if output.suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
        return [row["row"] for row in rows], np.array([row["embedding"] for row in rows], dtype=np.float32)
    table = pyarrow.dataset.dataset(output, exclude_invalid_files=False).to_table()
    values = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return table["row"].to_pylist(), values.reshape(table.num_rows, -1)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of an output by name; the state's length of time is not in it, so all bytes must agree."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
