"""The same job in Spark: a function for ``DataFrame.mapInPandas``, and the schema of what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from m3e.bulk.vectors import VectorOptions, VectorSource
from m3e.encoder import Encoder


def embed_partitions(
    bundle: str, text_field: str = "text", options: VectorOptions = VectorOptions(), *, threads: int = 1  # noqa: B008
) -> Callable[[Iterator[Any]], Iterator[Any]]:  # fmt: skip
    """Give the function that embeds the partitions of a data frame; it adds the column ``embedding``.

    Args:
        bundle: Where every executor finds the bundle.
        text_field: The column to embed.
        options: Of the vectors.
        threads: Of each task, as ``spark.task.cpus`` says.

    Returns:
        For ``data_frame.mapInPandas(function, output_schema(data_frame))``. The bundle is opened once in a partition.
    """

    def embed(partition: Iterator[Any]) -> Iterator[Any]:
        vectors = VectorSource(Encoder(bundle, num_threads=threads), options)
        for rows in partition:
            embeddings, _ = vectors.embed(rows[text_field].tolist())
            yield rows.assign(embedding=embeddings.astype("float32", copy=False).tolist())

    return embed


def output_schema(data_frame: Any) -> Any:
    """Give the schema of a data frame with ``embedding``, an array of floats, behind its columns."""
    from pyspark.sql.types import ArrayType, FloatType, StructType

    return StructType([*data_frame.schema.fields]).add("embedding", ArrayType(FloatType(), False), False)
