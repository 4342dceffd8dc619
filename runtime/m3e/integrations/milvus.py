"""Milvus: a collection of the right shape that remembers its space. Rows and queries go through Milvus' client."""

from __future__ import annotations

from pymilvus import DataType, MilvusClient

from m3e.encoder import Encoder
from m3e.integrations.space import check_space, space_metadata


def open_collection(client: MilvusClient, name: str, encoder: Encoder) -> None:
    """Make a collection for an encoder's vectors, or check one that is there.

    A new collection has the fields ``id`` and ``embedding``, with a cosine index; others are dynamic.

    Args:
        client: Any client: a server's, or of Milvus Lite's file.
        name: The collection.
        encoder: What its vectors come from.

    Raises:
        InputError: The collection holds vectors of another space, or does not say.
    """
    if not client.has_collection(name):
        schema = MilvusClient.create_schema(enable_dynamic_field=True)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=encoder.get_sentence_embedding_dimension())
        index = client.prepare_index_params()
        index.add_index("embedding", index_type="AUTOINDEX", metric_type="COSINE")
        client.create_collection(name, schema=schema, index_params=index, properties=space_metadata(encoder))
    check_space(client.describe_collection(name).get("properties"), encoder, f"the collection {name!r}")
    client.load_collection(name)
