"""Semantic search over a folder of documents: text and Markdown files, cut into passages.

Vectors are kept in a cache folder; only a file that changed is embedded again.

Examples:
  python examples/semantic_search/search.py docs "how do I resume a job that was killed" --bundle bundles/m3e-base
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

from m3e import Encoder

_PASSAGE_CHARACTERS = 400


def passages(text: str) -> list[str]:
    """Cut a document at its empty lines, and join short pieces up to the size of a passage."""
    found: list[str] = []
    for piece in (" ".join(piece.split()) for piece in text.split("\n\n")):
        if found and len(found[-1]) + len(piece) < _PASSAGE_CHARACTERS:
            found[-1] += "\n" + piece
        elif piece:
            found.append(piece)
    return found


def index(folder: Path, encoder: Encoder, cache: Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Embed what changed since last time; give every passage with its file, and the vectors."""
    cache.mkdir(exist_ok=True)
    rows: list[tuple[str, str]] = []
    vectors = [np.empty((0, encoder.get_sentence_embedding_dimension()), dtype=np.float32)]
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".md", ".txt")):
        found = passages(path.read_text(encoding="utf-8"))
        # The space is part of the name: another model's vectors are never read.
        key = hashlib.sha256(json.dumps([encoder.manifest.space_id, found]).encode()).hexdigest()
        stored = cache / f"{key}.npy"
        if not stored.exists():
            np.save(stored, encoder.encode_document(found, normalize_embeddings=True))
        vectors.append(np.load(stored))
        rows += [(str(path.relative_to(folder)), passage) for passage in found]
    return rows, np.concatenate(vectors)


def main() -> None:
    """Answer a question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("question")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--cache", type=Path, default=Path(".search-cache"))
    parser.add_argument("-k", type=int, default=3, help="passages to show")
    parsed = parser.parse_args()
    encoder = Encoder(parsed.bundle)
    rows, vectors = index(parsed.folder, encoder, parsed.cache)
    scores = vectors @ encoder.encode_query(parsed.question, normalize_embeddings=True)
    for row in np.argsort(-scores)[: parsed.k]:
        name, passage = rows[row]
        print(f"{scores[row]:.3f}  {name}\n       {passage[:160]}\n")


if __name__ == "__main__":
    main()
