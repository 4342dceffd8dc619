"""The same job on a Ray cluster: Ray Data reads, schedules and writes; here is its actor.

The rows' numbers are not in the output (a cluster reads many files at once); keep a field that names the row.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import numpy as np

from m3e.bulk.embed import Summary
from m3e.bulk.inputs import Input, filesystem_of
from m3e.bulk.job import STATE_NAME, State
from m3e.bulk.readers import check_columns
from m3e.bulk.records import Fields
from m3e.bulk.sinks import Rows, arrow_schema, to_table
from m3e.bulk.vectors import VectorOptions, VectorSource
from m3e.bulk.windows import WINDOW_RECORDS
from m3e.encoder import Encoder
from m3e.errors import DependencyError, InputError

_REJECTED = "_rejected"


class EncodeBatches:
    """A Ray actor: opens the bundle once and embeds Arrow tables.

    Args:
        encoder: Arguments of `Encoder`.
        options: Of the vectors.
        fields: Which column is the text, and which are copied.
        output: URL or path of the output; records that cannot be used are listed in a file under it.
    """

    def __init__(self, encoder: dict[str, Any], options: VectorOptions, fields: Fields, output: str) -> None:
        self._vectors = VectorSource(Encoder(**encoder), options)
        self._fields = fields
        self._filesystem, self._output = filesystem_of(output)
        self._task, self._n_batches = "", 0
        schema = arrow_schema(fields, self._vectors.space)
        self._schema = schema.remove(schema.get_field_index("row"))

    def __call__(self, table: Any) -> Any:
        """Embed the text column."""
        texts, kept, rejected = [], [], []
        for number, row in enumerate(table.to_pylist()):
            record = self._fields.record(0, number, number, row)
            if record.text is None:
                rejected.append({"problem": record.problem, "record": row})
            else:
                texts.append(record.text)
                kept.append(record.kept)
        self._list(rejected)
        embeddings, truncated = self._vectors.embed(texts)
        columns = {name: [values[i] for values in kept] for i, name in enumerate(self._fields.kept)}
        return to_table(Rows(np.zeros(len(texts), dtype=np.int64), columns, truncated, embeddings), self._schema)

    def _list(self, lines: list[dict[str, Any]]) -> None:
        """Write rejected records: themselves, because lines have no numbers in a cluster.

        A task that is done again has the same id, and gives the same files.
        """
        import ray

        task = ray.get_runtime_context().get_task_id()
        self._n_batches = self._n_batches + 1 if task == self._task else 0
        self._task = task
        if lines:
            data = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
            folder = f"{self._output}/{_REJECTED}"
            self._filesystem.makedirs(folder, exist_ok=True)
            self._filesystem.pipe_file(f"{folder}/{task}-{self._n_batches:06}.jsonl", data.encode("utf-8", "replace"))


def embed_on_ray(
    source: str, output: str, bundle: str, fields: Fields, options: VectorOptions, *, graph_precision: str = "auto",
    workers: int = 1, threads: int | None = None,
) -> Summary:  # fmt: skip
    """Embed a Parquet or JSON lines input into a folder of Parquet with an actor pool.

    Ray starts a lost actor again and gives it the batches it had, so a killed worker costs no row. The rows keep
    their order: that of the files' names, and in each its own.

    Args:
        source: A file or folder, or a URL of either for fsspec.
        output: A folder that must not be there yet, also a URL.
        bundle: Where every worker finds the bundle.
        fields: Which field is the text, and which are copied.
        options: Of the vectors.
        graph_precision: As for `m3e.Encoder`.
        workers: Actors.
        threads: Of each actor; None for its share of the cluster's processors.

    Returns:
        What was done.

    Raises:
        DependencyError: Ray, or what fsspec needs for a URL, is not installed.
        InputError: The output is there already, or the input has no such column, or one of another type.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DependencyError('Ray is not installed: pip install "m3e-runtime[bulk,ray]"') from error
    if workers < 1:
        raise InputError(f"workers is {workers}, expected at least 1")
    filesystem, folder = filesystem_of(output)
    if filesystem.exists(folder):
        raise InputError(f"{output!r} exists; Ray writes into a new folder, choose another -o")
    files = Input(source).files
    formats = {file.format for file in files}
    if formats not in ({"parquet"}, {"jsonl"}):
        raise InputError(f"Ray reads Parquet or JSON lines here, {source!r} has {' and '.join(sorted(formats))}; use "
                         "--engine local")  # fmt: skip
    started = time.monotonic()
    # Every option and the bundle are checked here, once, before a cluster is asked for anything.
    bundle = os.path.abspath(bundle)  # noqa: PTH100
    vectors = VectorSource(Encoder(bundle, precision=graph_precision), options)
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    threads = threads or _share(ray, workers)
    # The encoders may take every processor; reading and writing need few and must not wait for one that never comes.
    light: dict[str, Any] = {"ray_remote_args": {"num_cpus": 0}, "concurrency": workers}
    at: dict[str, Any] = {"paths": [filesystem_of(file.path)[1] for file in files],
                          "filesystem": filesystem_of(files[0].path)[0]}  # fmt: skip
    rows = ray.data.read_parquet(**at, **light) if formats == {"parquet"} else ray.data.read_json(
        **at, **light, lines=True, file_extensions=None)  # fmt: skip
    _check(rows.schema(), fields)
    rows.select_columns(fields.names).map_batches(
        EncodeBatches,
        fn_constructor_args=(
            {"bundle": bundle, "precision": graph_precision, "num_threads": threads},
            options,
            fields,
            filesystem.unstrip_protocol(folder),
        ),
        batch_format="pyarrow",
        batch_size=WINDOW_RECORDS,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=threads,
    ).write_parquet(folder, filesystem=filesystem, **light)
    return _finish(filesystem, folder, vectors, {"input": source, "columns": fields.kept, "engine": "ray"}, started)


def _share(ray: Any, workers: int) -> int:
    """Processors for each worker: all of them take what the cluster has, and none more than a machine."""
    machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return max(1, int(min(sum(machines) // workers, max(machines))))


def _check(schema: Any, fields: Fields) -> None:
    import pyarrow as pa

    check_columns(fields, schema.names)
    text = schema.types[schema.names.index(fields.text)]
    if not (pa.types.is_string(text) or pa.types.is_large_string(text) or pa.types.is_string_view(text)):
        raise InputError(f"the column {fields.text!r} is {text}, expected text; name another with --text-field")


def _finish(filesystem: Any, folder: str, vectors: VectorSource, job: dict[str, Any], started: float) -> Summary:
    """Count what was written, and say beside it what it is."""
    import pyarrow.dataset

    written = pyarrow.dataset.dataset(folder, filesystem=filesystem, format="parquet")
    lists = filesystem.glob(f"{folder}/{_REJECTED}/*.jsonl")
    state = State(
        space=vectors.space, job=job, complete=True,
        rows=written.count_rows(),
        truncated=written.count_rows(filter=pyarrow.dataset.field("truncated")),
        rejected=sum(filesystem.cat_file(path).count(b"\n") for path in lists),
    )  # fmt: skip
    filesystem.pipe_file(f"{folder}/{STATE_NAME}", state.to_bytes())
    return Summary(state.rows, state.rows, state.rejected, state.truncated, time.monotonic() - started)
