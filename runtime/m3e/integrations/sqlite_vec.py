"""sqlite-vec: a virtual table of the right shape, in a database that remembers its space. The rest is SQL."""

from __future__ import annotations

import importlib
import os
import re
from typing import Any

import sqlite_vec

from m3e.encoder import Encoder
from m3e.errors import DependencyError, InputError
from m3e.integrations.space import SPACE_KEY, check_space

serialize = sqlite_vec.serialize_float32
_SPACES = "m3e_spaces"


def connect(path: str | os.PathLike[str]) -> Any:
    """Open a database that can load the extension: with Python's sqlite3, or pysqlite3 where that was built without.

    Raises:
        DependencyError: Neither can.
    """
    for name in ("sqlite3", "pysqlite3"):
        try:
            connection = importlib.import_module(name).connect(os.fspath(path))
        except ImportError:
            continue
        if hasattr(connection, "enable_load_extension"):
            return connection
        connection.close()
    raise DependencyError("this Python's sqlite3 cannot load extensions: pip install pysqlite3-binary")


def open_table(connection: Any, name: str, encoder: Encoder) -> None:
    """Load the extension, and make a table ``name(embedding)`` with cosine distance, or check one that is there.

    Args:
        connection: The database, from `connect`.
        name: The table: letters, digits and underscores.
        encoder: What its vectors come from. `serialize` turns a vector into a value of the table.

    Raises:
        InputError: The table holds vectors of another space, or does not say.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise InputError(f"the table's name is {name!r}, expected letters, digits and underscores")
    connection.enable_load_extension(True)
    sqlite_vec.load(connection)
    connection.enable_load_extension(False)
    with connection:
        connection.execute(f"CREATE TABLE IF NOT EXISTS {_SPACES} (name TEXT PRIMARY KEY, space_id TEXT)")
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone() is None:
            dim = encoder.get_sentence_embedding_dimension()
            connection.execute(f"CREATE VIRTUAL TABLE {name} USING vec0(embedding float[{dim}] distance_metric=cosine)")
            connection.execute(f"INSERT OR REPLACE INTO {_SPACES} VALUES (?, ?)",  # noqa: S608 (a constant)
                               (name, encoder.manifest.space_id))  # fmt: skip
    row = connection.execute(f"SELECT space_id FROM {_SPACES} WHERE name = ?", (name,)).fetchone()  # noqa: S608
    check_space({SPACE_KEY: row[0]} if row else None, encoder, f"the table {name!r}")
