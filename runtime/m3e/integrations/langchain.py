"""LangChain: its ``Embeddings``."""

from __future__ import annotations

import os

from langchain_core.embeddings import Embeddings

from m3e.encoder import Encoder


class M3EEmbeddings(Embeddings):
    """Embed with a bundle.

    Args:
        bundle: Folder written by ``convert.py``, or an `Encoder` that is open already.
        normalize: Vectors of unit length, so that any of a store's distances ranks by the cosine.
    """

    def __init__(self, bundle: str | os.PathLike[str] | Encoder, *, normalize: bool = True) -> None:
        self.encoder = bundle if isinstance(bundle, Encoder) else Encoder(bundle)
        self.normalize = normalize

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed what is searched."""
        vectors: list[list[float]] = self.encoder.encode_document(texts, normalize_embeddings=self.normalize).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Embed a query."""
        vector: list[float] = self.encoder.encode_query(text, normalize_embeddings=self.normalize).tolist()
        return vector
