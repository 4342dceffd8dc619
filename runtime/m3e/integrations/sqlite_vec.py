"""sqlite-vec: a virtual table of the right shape, in a database that remembers its space. The rest is SQL."""

from __future__ import annotations

import re
import sqlite3

import sqlite_vec

from m3e.encoder import Encoder
from m3e.errors import InputError
from m3e.integrations.space import SPACE_KEY, check_space

serialize = sqlite_vec.serialize_float32
_SPACES = "m3e_spaces"


def open_table(connection: sqlite3.Connection, name: str, encoder: Encoder) -> None:
    """Load the extension, and make a table ``name(embedding)`` with cosine distance, or check one that is there.

    Args:
        connection: The database.
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
