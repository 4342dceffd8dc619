"""Qdrant: a collection of the right shape that remembers its space. Points and queries go through Qdrant's client."""

from __future__ import annotations

from qdrant_client import QdrantClient, models

from m3e.encoder import Encoder
from m3e.integrations.space import check_space, space_metadata


def open_collection(client: QdrantClient, name: str, encoder: Encoder) -> None:
    """Make a collection for an encoder's vectors, or check one that is there.

    Args:
        client: Any client: a server's, or one with a ``path`` or ``:memory:``.
        name: The collection.
        encoder: What its vectors come from.

    Raises:
        InputError: The collection holds vectors of another space, or does not say.
    """
    if not client.collection_exists(name):
        size = encoder.get_sentence_embedding_dimension()
        vectors = models.VectorParams(size=size, distance=models.Distance.COSINE)
        client.create_collection(name, vectors_config=vectors, metadata=space_metadata(encoder))
    check_space(client.get_collection(name).config.metadata, encoder, f"the collection {name!r}")
