"""LlamaIndex: its ``BaseEmbedding``."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from m3e.encoder import Encoder


class M3EEmbedding(BaseEmbedding):
    """Embed with a bundle.

    Args:
        bundle: Folder written by ``convert.py``.
        normalize: Vectors of unit length.
        **arguments: Those of ``BaseEmbedding``.
    """

    bundle: str
    normalize: bool = True
    _encoder: Encoder = PrivateAttr()

    def __init__(self, bundle: str, **arguments: Any) -> None:
        super().__init__(bundle=str(bundle), **{"model_name": "m3e", "embed_batch_size": 512, **arguments})
        self._encoder = Encoder(bundle)

    @classmethod
    def class_name(cls) -> str:
        """Give the name that LlamaIndex stores."""
        return "M3EEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        vector: list[float] = self._encoder.encode_query(query, normalize_embeddings=self.normalize).tolist()
        return vector

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._encoder.encode_document(texts, normalize_embeddings=self.normalize).tolist()
        return vectors

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
