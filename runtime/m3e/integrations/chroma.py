"""Chroma: an embedding function that Chroma stores with the collection and builds again when it is opened."""

from __future__ import annotations

from typing import Any

import chromadb.utils.embedding_functions as registry
import numpy as np
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space

from m3e.encoder import Encoder
from m3e.errors import InputError
from m3e.integrations.space import SPACE_KEY, check_space, space_metadata


class M3EEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embed with a bundle; vectors have unit length.

    Args:
        bundle: Folder written by ``convert.py``. Chroma stores the path.
        precision: Which graph, as for `m3e.Encoder`.

    Raises:
        BundleError: There is no bundle.
    """

    def __init__(self, bundle: str, precision: str = "auto") -> None:
        self._bundle = str(bundle)
        self._precision = precision
        self._encoder = Encoder(bundle, precision=precision)

    def __call__(self, input: Documents) -> Embeddings:  # noqa: A002 (Chroma's name)
        """Embed documents."""
        return list(self._encoder.encode_document(list(input), normalize_embeddings=True))

    def embed_query(self, input: Documents) -> Embeddings:  # noqa: A002 (Chroma's name)
        """Embed queries."""
        return list(np.asarray(self._encoder.encode_query(list(input), normalize_embeddings=True)))

    @staticmethod
    def name() -> str:
        """Give the name under which Chroma finds this class."""
        return "m3e"

    def default_space(self) -> Space:
        """Cosine, as the models were trained."""
        return "cosine"

    def supported_spaces(self) -> list[Space]:
        """All of them: vectors have unit length."""
        return ["cosine", "l2", "ip"]

    def get_config(self) -> dict[str, Any]:
        """Say what is stored with the collection."""
        return {"bundle": self._bundle, "precision": self._precision, **space_metadata(self._encoder)}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> M3EEmbeddingFunction:
        """Open the bundle that a collection was made with.

        Raises:
            InputError: Another bundle lies there now.
        """
        function = M3EEmbeddingFunction(config["bundle"], config["precision"])
        check_space(config, function._encoder, "the collection")
        return function

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Let a bundle move, and not change its space."""
        if old_config[SPACE_KEY] != new_config[SPACE_KEY]:
            raise InputError(f"the collection holds vectors of the space {old_config[SPACE_KEY]}, not of "
                             f"{new_config[SPACE_KEY]}; make another collection")  # fmt: skip

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """Check what was stored."""
        if set(config) != {"bundle", "precision", SPACE_KEY}:
            raise InputError(f"the embedding function's configuration has the fields {sorted(config)}, expected "
                             f"bundle, precision, {SPACE_KEY}")  # fmt: skip


registry.register_embedding_function(M3EEmbeddingFunction)


def open_collection(client: Any, name: str, bundle: str) -> Any:
    """Make a collection for a bundle's vectors, or check one that is there.

    Chroma itself compares no more than the functions' names and the vectors' length when a collection is opened with
    another function.

    Args:
        client: Any Chroma client.
        name: The collection.
        bundle: Folder written by ``convert.py``.

    Returns:
        Chroma's collection.

    Raises:
        InputError: The collection holds vectors of another space, or does not say.
    """
    function = M3EEmbeddingFunction(bundle)
    own = space_metadata(function._encoder)
    collection = client.get_or_create_collection(name, embedding_function=function, metadata=own)
    check_space(collection.metadata, function._encoder, f"the collection {name!r}")
    return collection
