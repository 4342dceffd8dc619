"""FAISS: an index file and, beside it, what its vectors are. Adding and searching go through FAISS."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import faiss

from m3e.encoder import Encoder
from m3e.errors import InputError
from m3e.integrations.space import check_space, space_metadata


def new_index(encoder: Encoder, factory: str = "Flat") -> Any:
    """Make an index for unit vectors (``encode(..., normalize_embeddings=True)``): inner product, which is the cosine.

    Args:
        encoder: What the vectors come from.
        factory: FAISS' description of the index, ``Flat`` or e.g. ``IVF1024,PQ32``.
    """
    return faiss.index_factory(encoder.get_sentence_embedding_dimension(), factory, faiss.METRIC_INNER_PRODUCT)


def write_index(index: Any, path: str | os.PathLike[str], encoder: Encoder) -> None:
    """Write an index, and its space to ``PATH.json``."""
    _side(path).write_text(json.dumps(space_metadata(encoder)) + "\n")
    faiss.write_index(index, os.fspath(path))


def read_index(path: str | os.PathLike[str], encoder: Encoder) -> Any:
    """Read an index.

    Raises:
        InputError: There is none, it holds vectors of another space, or does not say.
    """
    if not Path(path).exists():
        raise InputError(f"no index at {str(path)!r}")
    stored = json.loads(_side(path).read_text()) if _side(path).exists() else None
    check_space(stored, encoder, f"the index {str(path)!r}")
    return faiss.read_index(os.fspath(path))


def _side(path: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(path)}.json")
