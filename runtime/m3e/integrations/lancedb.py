"""LanceDB: an embedding function that LanceDB stores in the table and builds again when it is opened."""

from __future__ import annotations

import json
from typing import Any

from lancedb.embeddings import TextEmbeddingFunction, register
from pydantic import PrivateAttr

from m3e.encoder import Encoder
from m3e.integrations.space import SPACE_KEY, check_space


@register("m3e")
class M3EEmbeddings(TextEmbeddingFunction):
    """Embed with a bundle; vectors have unit length. Make one with `open_embeddings`.

    Args:
        bundle: Folder written by ``convert.py``. LanceDB stores the path.
        space_id: What the table's vectors are; opening another bundle is refused.

    Raises:
        InputError: The bundle's vectors are of another space.
    """

    bundle: str
    space_id: str
    _encoder: Encoder = PrivateAttr()

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._encoder = Encoder(self.bundle)
        check_space({SPACE_KEY: self.space_id}, self._encoder, "the table")
        self._ndims = self._encoder.get_sentence_embedding_dimension()

    def generate_embeddings(self, texts: Any, *_: Any, **__: Any) -> list[Any]:
        """Embed documents."""
        return list(self._encoder.encode_document([str(text) for text in texts], normalize_embeddings=True))

    def compute_query_embeddings(self, query: Any, *_: Any, **__: Any) -> list[Any]:
        """Embed a query."""
        return list(self._encoder.encode_query(self.sanitize_input(query), normalize_embeddings=True))

    def ndims(self) -> int:
        """Length of a vector."""
        return self._ndims


def open_embeddings(bundle: str) -> M3EEmbeddings:
    """Give the embedding function of a bundle, for a table's model."""
    function: M3EEmbeddings = M3EEmbeddings.create(bundle=str(bundle), space_id=Encoder(bundle).manifest.space_id)
    return function


def open_table(database: Any, name: str, model: Any) -> Any:
    """Make a table of a model, or check one that is there.

    Args:
        database: What ``lancedb.connect`` gave.
        name: The table.
        model: A ``LanceModel`` with fields of `open_embeddings`.

    Returns:
        LanceDB's table.

    Raises:
        InputError: The table holds vectors of another space, or does not say.
    """
    try:
        table = database.open_table(name)
    except (ValueError, FileNotFoundError):  # LanceDB's ways to say that there is none
        table = database.create_table(name, schema=model)
    functions = json.loads((table.schema.metadata or {}).get(b"embedding_functions", b"[]"))
    spaces = {function["vector_column"]: function["model"].get("space_id") for function in functions}
    for column in model.parse_embedding_functions():
        if isinstance(column.function, M3EEmbeddings):
            stored = {SPACE_KEY: spaces.get(column.vector_column)}
            check_space(stored, column.function._encoder, f"the table {name!r}")
    return table
