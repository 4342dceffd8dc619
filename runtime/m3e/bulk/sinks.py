"""Vectors -> files. What a sink has committed survives a kill; what came after is written again, byte for byte."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from m3e.bulk.durable import AppendedFile, publish
from m3e.bulk.readers import import_parquet
from m3e.bulk.records import Fields

METADATA_KEY = b"m3e"
JOINED_NAME, NPY_NAME, JSONL_NAME, ROWS_NAME = "joined.parquet", "vectors.npy", "vectors.jsonl", "rows.npy"


@dataclass(frozen=True, slots=True)
class Rows:
    """What goes to the output for some records.

    Attributes:
        rows: int64 (n,), the number of each record in the input.
        columns: Values of the kept fields by name.
        truncated: bool (n,), whether the text was longer than the model reads.
        embeddings: (n, dim).
    """

    rows: npt.NDArray[np.int64]
    columns: dict[str, list[Any]]
    truncated: npt.NDArray[np.bool_]
    embeddings: npt.NDArray[Any]


class Sink(Protocol):
    """A place for rows. ``commit`` gives what it needs to know to go on from there."""

    def write(self, rows: Rows) -> None:
        """Add rows."""

    def commit(self) -> dict[str, int]:
        """Bring all rows to the disk."""

    def finish(self) -> None:
        """Complete the files, all rows being committed. Doing it twice is the same as doing it once."""

    def close(self) -> None:
        """Let go of the files without completing them."""


class ParquetParts:
    """A folder of ``part-NNNNNN.parquet``, one for each commit; `finish` may join them to one file.

    The vectors are Arrow fixed-size lists. The schema's metadata carries the space.
    """

    def __init__(self, folder: Path, schema: Any, done: dict[str, int], *, joined: bool) -> None:
        self._parquet = import_parquet()
        self._folder = folder
        self._schema = schema
        self._n_parts = done.get("parts", 0)
        self._joined = joined
        self._writer: Any = None
        self._temporary = folder / "_part.tmp"

    def write(self, rows: Rows) -> None:
        """Write a row group."""
        if self._writer is None:
            self._writer = _open_writer(self._temporary, self._schema)
        self._writer.write_table(to_table(rows, self._schema))

    def commit(self) -> dict[str, int]:
        """Publish the part that was written, if any."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            publish(self._temporary, self._part(self._n_parts))
            self._n_parts += 1
        return {"parts": self._n_parts}

    def finish(self) -> None:
        """Join the parts if that was asked for; they stay beside the joined file."""
        self._temporary.unlink(missing_ok=True)
        if not self._joined:
            return
        with _open_writer(self._temporary, self._schema) as writer:
            for part in map(self._part, range(self._n_parts)):
                with self._parquet.ParquetFile(part) as opened:
                    for group in range(opened.num_row_groups):
                        writer.write_table(opened.read_row_group(group))
        publish(self._temporary, self._folder / JOINED_NAME)

    def close(self) -> None:
        """Drop the unfinished part."""
        if self._writer is not None:
            self._writer.close()

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:06}.parquet"


class NpyFile:
    """One ``.npy`` of the vectors, for ``np.load(..., mmap_mode="r")``, and beside it one of the row numbers."""

    def __init__(self, folder: Path, dtype: npt.DTypeLike, dim: int, done: dict[str, int]) -> None:
        self._dtype = np.dtype(dtype)
        self._dim = dim
        self._n_rows = done.get("rows", 0)
        start = len(_npy_header(np.dtype(np.int64), (0,))), len(_npy_header(self._dtype, (0, dim)))
        self._rows = AppendedFile(folder / ROWS_NAME, start[0] + self._n_rows * 8)
        self._vectors = AppendedFile(folder / NPY_NAME, start[1] + self._n_rows * dim * self._dtype.itemsize)

    def write(self, rows: Rows) -> None:
        """Append the bytes of the rows."""
        self._rows.write(rows.rows.astype("<i8").tobytes())
        self._vectors.write(np.ascontiguousarray(rows.embeddings).data.cast("B"))
        self._n_rows += len(rows.rows)

    def commit(self) -> dict[str, int]:
        """Bring both files to the disk."""
        self._rows.commit()
        self._vectors.commit()
        return {"rows": self._n_rows}

    def finish(self) -> None:
        """Write the headers, now that the number of rows is known."""
        headers = [
            _npy_header(np.dtype(np.int64), (self._n_rows,)),
            _npy_header(self._dtype, (self._n_rows, self._dim)),
        ]
        for file, header in zip((self._rows, self._vectors), headers, strict=True):
            file.write_at_start(header)

    def close(self) -> None:
        """Close both files."""
        self._rows.close()
        self._vectors.close()


class JsonlFile:
    """A JSON object a line, with the vector as a list."""

    def __init__(self, folder: Path, done: dict[str, int]) -> None:
        self._file = AppendedFile(folder / JSONL_NAME, done.get("bytes", 0))

    def write(self, rows: Rows) -> None:
        """Append a line for each row."""
        for i, row in enumerate(rows.rows.tolist()):
            line = {"row": row, **{name: values[i] for name, values in rows.columns.items()}}
            line |= {"truncated": bool(rows.truncated[i]), "embedding": rows.embeddings[i].tolist()}
            self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())

    def commit(self) -> dict[str, int]:
        """Bring the lines to the disk."""
        return {"bytes": self._file.commit()}

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def arrow_schema(fields: Fields, space: dict[str, Any]) -> Any:
    """Give the schema of Parquet output: row, kept fields, truncated, embedding; the space is its metadata."""
    import_parquet()
    import pyarrow as pa

    types = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    vectors = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}[space["precision"]]
    columns = [("row", pa.int64()), *((name, types[kind]) for name, kind in fields.kept.items())]
    columns += [("truncated", pa.bool_()), ("embedding", pa.list_(vectors, space["dim"]))]
    return pa.schema(columns, metadata={METADATA_KEY: json.dumps(space, ensure_ascii=False)})


def to_table(rows: Rows, schema: Any) -> Any:
    """Lay rows out as an Arrow table; the vectors are not copied."""
    import pyarrow as pa

    embedding = schema.field("embedding").type
    values = pa.array(np.ascontiguousarray(rows.embeddings).reshape(-1), type=embedding.value_type)
    arrays = {
        "row": pa.array(rows.rows),
        "truncated": pa.array(rows.truncated),
        "embedding": pa.FixedSizeListArray.from_arrays(values, type=embedding),
    }
    arrays |= {name: pa.array(values, type=schema.field(name).type) for name, values in rows.columns.items()}
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _open_writer(path: Path, schema: Any) -> Any:
    """Vectors do not compress and do not repeat; everything else does."""
    parquet = import_parquet()
    others = [name for name in schema.names if name != "embedding"]
    compression = {"embedding.list.element": "NONE"} | dict.fromkeys(others, "ZSTD")
    return parquet.ParquetWriter(
        path, schema, compression=compression, use_dictionary=False, write_statistics=others, store_schema=True
    )


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """A header whose length does not depend on the number of rows: numpy leaves room for the first axis to grow."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return header.getvalue()
