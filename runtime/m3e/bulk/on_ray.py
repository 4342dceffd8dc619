"""The same job on a Ray cluster: Ray Data schedules, retries and writes; here are the reading task and the actor.

The rows' numbers are not in the output, because files are read side by side; keep a field that names the row.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from m3e.bulk.embed import Summary
from m3e.bulk.inputs import Input, filesystem_of
from m3e.bulk.job import STATE_NAME, State
from m3e.bulk.records import Fields
from m3e.bulk.sinks import Rows, arrow_schema, to_table
from m3e.bulk.vectors import VectorOptions, VectorSource
from m3e.bulk.windows import WINDOW_RECORDS, windows
from m3e.checks import check_integer
from m3e.encoder import Encoder
from m3e.errors import DependencyError, InputError

_REJECTED = "_rejected"
_TEXT = "m3e text"  # beside the kept fields, which may hold the text again


def read_file(batch: Any, source: Input, fields: Fields, schema: Any, output: str) -> Iterator[Any]:
    """Read the file whose number is in a batch: tables of usable records. The others go to a side file of its own.

    A task that is done again writes the same side file again.
    """
    import pyarrow as pa

    (index,) = batch["item"].to_pylist()
    filesystem, folder = filesystem_of(output)
    with contextlib.ExitStack() as opened:
        rejected: Any = None
        for window in windows(source.records_of_file(index, fields), 0):
            if window.rejected and rejected is None:
                filesystem.makedirs(f"{folder}/{_REJECTED}", exist_ok=True)
                rejected = opened.enter_context(filesystem.open(f"{folder}/{_REJECTED}/{index:06}.jsonl", "wb"))
            for record in window.rejected:
                rejected.write(record.rejection(source.files[index].name))
            columns = [window.texts, *([values[i] for values in window.kept] for i in range(len(fields.kept)))]
            yield pa.table([pa.array(c, type=t) for c, t in zip(columns, schema.types, strict=True)], schema=schema)


class EncodeBatches:
    """A Ray actor: opens the bundle once and embeds tables of `read_file`.

    Args:
        encoder: Arguments of `Encoder`.
        options: Of the vectors.
        fields: Which are copied.
        schema: Of the output.
    """

    def __init__(self, encoder: dict[str, Any], options: VectorOptions, fields: Fields, schema: Any) -> None:
        self._vectors = VectorSource(Encoder(**encoder), options)
        self._fields = fields
        self._schema = schema

    def __call__(self, table: Any) -> Any:
        """Embed the texts."""
        embeddings, truncated = self._vectors.embed(table[_TEXT].to_pylist())
        kept = {name: table[name].to_pylist() for name in self._fields.kept}
        return to_table(Rows(np.zeros(len(table), dtype=np.int64), kept, truncated, embeddings), self._schema)


def embed_on_ray(
    source: Input, output: str, bundle: str, fields: Fields, options: VectorOptions, *, graph_precision: str = "auto",
    workers: int = 1, threads: int | None = None,
) -> Summary:  # fmt: skip
    """Embed into a folder of Parquet with an actor pool.

    Ray starts a lost actor again and gives it the batches it had, so a killed worker costs no row. The rows keep
    their order: the files of the output in the order of their names.

    Args:
        source: What to read: a task for each file, so every machine must see them.
        output: A folder that must not be there yet, also a URL for fsspec.
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
        InputError: The output is there already, or the input cannot be read.
    """
    try:
        import pyarrow as pa
        import ray
        import ray.data
    except ImportError as error:
        raise DependencyError('Ray is not installed: pip install "m3e-runtime[bulk,ray]"') from error
    workers = check_integer("workers", workers)
    if any(file.path == "-" for file in source.files):
        raise InputError("a cluster cannot read this process's standard input; give a file, or use --engine local")
    filesystem, folder = filesystem_of(output)
    if filesystem.exists(folder):
        raise InputError(f"{output!r} exists; Ray writes into a new folder, choose another -o")
    started = time.monotonic()
    # Every option, the bundle and the first records are checked here, once, before a cluster is asked for anything.
    encoder: dict[str, Any] = {"bundle": os.path.abspath(bundle), "precision": graph_precision}  # noqa: PTH100
    vectors = VectorSource(Encoder(**encoder), options)
    for window in windows(source.records(fields), 0):
        window.check_usable()
        break
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    threads = threads or _share(ray, workers)
    schema = arrow_schema(fields, vectors.space)
    schema = schema.remove(schema.get_field_index("row"))
    read = pa.schema([(_TEXT, pa.string()), *(schema.field(name) for name in fields.kept)])
    # The encoders may hold every processor of the cluster. Ray Data's own readers ask for one and would wait for it
    # without end, so reading and writing ask for none; as many of them run at a time as there are encoders.
    files = ray.data.from_items(list(range(len(source.files))), override_num_blocks=len(source.files))
    records = files.map_batches(
        read_file,
        fn_kwargs={"source": source, "fields": fields, "schema": read, "output": filesystem.unstrip_protocol(folder)},
        batch_format="pyarrow",
        batch_size=1,
        compute=ray.data.TaskPoolStrategy(size=workers),
        num_cpus=0,
    )
    embedded = records.map_batches(
        EncodeBatches,
        fn_constructor_args=({**encoder, "num_threads": threads}, options, fields, schema),
        batch_format="pyarrow",
        batch_size=WINDOW_RECORDS,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=threads,
    )
    embedded.write_parquet(folder, filesystem=filesystem, ray_remote_args={"num_cpus": 0}, concurrency=workers)
    job = {"input": source.identity, "columns": fields.kept, "engine": "ray"}
    state = State(space=vectors.space, job=job, complete=True)
    absent = _count(filesystem, folder, schema, state, fields.kept)
    filesystem.pipe_file(f"{folder}/{STATE_NAME}", state.to_bytes())
    return Summary(state.rows, state.rows, state.rejected, state.truncated, time.monotonic() - started, absent)


def _share(ray: Any, workers: int) -> int:
    """Processors for each worker: all of them take what the cluster has, and none more than a machine."""
    machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return max(1, int(min(sum(machines) // workers, max(machines))))


def _count(filesystem: Any, folder: str, schema: Any, state: State, kept: Iterable[str]) -> tuple[str, ...]:
    """Fill a state in from what was written, and name the kept fields of which there is nothing."""
    import pyarrow.dataset

    filesystem.invalidate_cache()  # other processes wrote
    filesystem.makedirs(folder, exist_ok=True)  # nothing was, of an input without records
    written = pyarrow.dataset.dataset(folder, schema, format="parquet", filesystem=filesystem)
    state.rows = written.count_rows()
    state.truncated = written.count_rows(filter=pyarrow.dataset.field("truncated"))
    for path in filesystem.glob(f"{folder}/{_REJECTED}/*.jsonl"):
        state.rejected += filesystem.cat_file(path).count(b"\n")
    return tuple(
        name for name in sorted(kept)
        if state.rows and not written.count_rows(filter=pyarrow.dataset.field(name).is_valid())
    )  # fmt: skip
