"""Haystack: components for documents and for queries."""

from __future__ import annotations

import dataclasses
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

from m3e.encoder import Encoder
from m3e.errors import InputError


@component
class M3ETextEmbedder:
    """Embed a query.

    Args:
        bundle: Folder written by ``convert.py``.
        normalize: Vectors of unit length.
    """

    def __init__(self, bundle: str, normalize: bool = True) -> None:
        self.bundle = str(bundle)
        self.normalize = normalize
        self._encoder: Encoder | None = None

    def warm_up(self) -> None:
        """Open the bundle; `run` does so too."""
        self._encoder = self._encoder or Encoder(self.bundle)

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        """Embed the text."""
        self.warm_up()
        assert self._encoder is not None
        return {"embedding": self._encoder.encode_query(text, normalize_embeddings=self.normalize).tolist()}

    def to_dict(self) -> dict[str, Any]:
        """Serialise for a pipeline."""
        stored: dict[str, Any] = default_to_dict(self, bundle=self.bundle, normalize=self.normalize)
        return stored

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> M3ETextEmbedder:
        """Build from what `to_dict` gave."""
        built: M3ETextEmbedder = default_from_dict(cls, data)
        return built


@component
class M3EDocumentEmbedder:
    """Put its vector into each document.

    Args:
        bundle: Folder written by ``convert.py``.
        normalize: Vectors of unit length.
        meta_fields_to_embed: Fields of the documents' meta to put before the content.
        embedding_separator: What stands between those.
    """

    def __init__(
        self, bundle: str, normalize: bool = True, meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:  # fmt: skip
        self.bundle = str(bundle)
        self.normalize = normalize
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator
        self._encoder: Encoder | None = None

    def warm_up(self) -> None:
        """Open the bundle; `run` does so too."""
        self._encoder = self._encoder or Encoder(self.bundle)

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Give the documents again, each with its vector.

        Raises:
            InputError: A document has no text.
        """
        self.warm_up()
        assert self._encoder is not None
        texts = [self._text(i, document) for i, document in enumerate(documents)]
        vectors = self._encoder.encode_document(texts, normalize_embeddings=self.normalize)
        return {"documents": [dataclasses.replace(document, embedding=vector.tolist())
                              for document, vector in zip(documents, vectors, strict=True)]}  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Serialise for a pipeline."""
        stored: dict[str, Any] = default_to_dict(
            self, bundle=self.bundle, normalize=self.normalize, meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
        )  # fmt: skip
        return stored

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> M3EDocumentEmbedder:
        """Build from what `to_dict` gave."""
        built: M3EDocumentEmbedder = default_from_dict(cls, data)
        return built

    def _text(self, i: int, document: Document) -> str:
        if document.content is None:
            raise InputError(f"document {i} ({document.id}) has no content to embed")
        meta = [str(document.meta[name]) for name in self.meta_fields_to_embed if document.meta.get(name) is not None]
        return self.embedding_separator.join([*meta, document.content])
