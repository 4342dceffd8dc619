"""The same job on a Ray cluster: Ray Data reads, schedules and writes; here is its actor.

The rows' numbers are not in the output (a cluster reads many files at once); keep a field that names the row.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from m3e.bulk.inputs import Input
from m3e.bulk.job import State
from m3e.bulk.records import Fields
from m3e.bulk.sinks import Rows, arrow_schema, to_table
from m3e.bulk.vectors import VectorOptions, VectorSource
from m3e.bulk.windows import WINDOW_RECORDS
from m3e.encoder import Encoder
from m3e.errors import DependencyError, InputError


class EncodeBatches:
    """A Ray actor: opens the bundle once and embeds Arrow tables."""

    def __init__(
        self, bundle: str, fields: Fields, options: VectorOptions, graph_precision: str, threads: int | None
    ) -> None:
        encoder = Encoder(bundle, precision=graph_precision, num_threads=threads)
        self._vectors = VectorSource(encoder, options)
        self._fields = fields
        schema = arrow_schema(fields, self._vectors.space)
        self._schema = schema.remove(schema.get_field_index("row"))

    def __call__(self, table: Any) -> Any:
        """Embed the text column; rows without a usable text raise, because a cluster has no side file for them."""
        kept: dict[str, list[Any]] = {name: [] for name in self._fields.kept}
        texts = []
        for number, values in enumerate(table.select(self._fields.names).to_pylist(), start=1):
            record = self._fields.record(0, number, number, values)
            if record.text is None:
                raise InputError(f"row {number} of a batch cannot be used: {record.problem}; filter such rows out, or "
                                 "use --engine local, which lists them")  # fmt: skip
            texts.append(record.text)
            for name, value in zip(self._fields.kept, record.kept, strict=True):
                kept[name].append(value)
        embeddings, truncated = self._vectors.embed(texts)
        rows = Rows(np.zeros(len(texts), dtype=np.int64), kept, truncated, embeddings)
        return to_table(rows, self._schema)


def embed_on_ray(
    source: str, output: str, bundle: str, fields: Fields, options: VectorOptions, *, graph_precision: str = "auto",
    workers: int = 1, threads: int | None = None,
) -> None:  # fmt: skip
    """Embed a Parquet or JSON lines input into a folder of Parquet with an actor pool.

    Ray starts a lost actor again and gives it the batches it had, so a killed worker costs no row. The rows keep
    their order.

    Args:
        source: A file or folder that Ray Data reads, also a URL.
        output: A folder that must not be there yet, also a URL.
        bundle: Where every worker finds the bundle.
        fields: Which field is the text, and which are copied.
        options: Of the vectors.
        graph_precision: As for `m3e.Encoder`.
        workers: Actors.
        threads: Of each actor; None for its share of this machine's.

    Raises:
        DependencyError: Ray is not installed.
        InputError: The output is there already, or the input has no such column.
    """
    try:
        import ray
    except ImportError as error:
        raise DependencyError('Ray is not installed: pip install "m3e-runtime[bulk,ray]"') from error
    if workers < 1:
        raise InputError(f"workers is {workers}, expected at least 1")
    if "://" not in output and Path(output).exists():
        raise InputError(f"{output!r} exists; Ray writes into a new folder, choose another -o")
    # Every option and the bundle are checked here, once, before a cluster is asked for anything.
    vectors = VectorSource(Encoder(bundle, precision=graph_precision), options)
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = ray.data.read_parquet(source) if _is_parquet(source) else ray.data.read_json(source, lines=True)
    names = rows.schema().names
    missing = [name for name in fields.names if name not in names]
    if missing:
        raise InputError(f"the input has no column {', '.join(map(repr, missing))}, only {', '.join(map(repr, names))}")
    per_actor = threads or max(1, vectors.encoder.num_threads // workers)
    rows.select_columns(fields.names).map_batches(
        EncodeBatches,
        fn_constructor_args=(os.path.abspath(bundle), fields, options, graph_precision, per_actor),  # noqa: PTH100
        batch_format="pyarrow",
        batch_size=WINDOW_RECORDS,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=per_actor,
    ).write_parquet(output)
    if "://" not in output:
        state = State(
            space=vectors.space, job={"input": source, "columns": fields.kept, "engine": "ray"}, complete=True
        )
        state.save(Path(output))


def _is_parquet(source: str) -> bool:
    if "://" in source:
        return not source.endswith((".json", ".jsonl"))
    formats = {file.format for file in Input(source).files}
    if formats == {"parquet"} or formats == {"jsonl"}:
        return formats == {"parquet"}
    raise InputError(
        f"Ray reads Parquet or JSON lines here, {source!r} has {' and '.join(sorted(formats))}; use --engine local"
    )
