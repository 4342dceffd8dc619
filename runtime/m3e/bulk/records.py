"""One record of an input: its text, the fields to keep beside the vector, or what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from m3e.errors import InputError

OUTPUT_COLUMNS = ("row", "truncated", "embedding")
_INT64 = range(-(2**63), 2**63)


class Record(NamedTuple):
    """A record as it was read.

    Attributes:
        file: Index of the input file.
        number: Records of the file up to and with this one.
        line: Where it ends in the file, from 1: a line of text, a row of Parquet or of a data set.
        text: What to embed; None where the record cannot be used.
        kept: Values of the kept fields, in their order.
        problem: Why it cannot be used; empty where it can.
    """

    file: int
    number: int
    line: int
    text: str | None
    kept: tuple[Any, ...] = ()
    problem: str = ""

    def rejection(self, file_name: str) -> bytes:
        """The line of the side file that lists it."""
        line = {"file": file_name, "line": self.line, "problem": self.problem}
        return (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace")


class Fields:
    """Which fields of a record matter.

    Args:
        text: Name of the field to embed.
        keep: ``NAME`` or ``NAME:TYPE`` of fields to copy to the output, the text's own too if it is wanted there; the
            types are those of `KEEP_TYPES`, ``string`` where none is named.

    Attributes:
        absent: Fields to keep that no record so far has had.

    Raises:
        InputError: An unknown type, or a name twice.
    """

    def __init__(self, text: str, keep: tuple[str, ...] = ()) -> None:
        self.text = text
        self.kept: dict[str, str] = {}
        self.absent: set[str] = set()
        for item in keep:
            name, colon, kind = item.rpartition(":")
            name, kind = (name, kind) if colon else (item, "string")
            if kind not in KEEP_TYPES:
                raise InputError(
                    f"{kind!r} in --keep {item!r} is no type, expected one of {', '.join(KEEP_TYPES)}; "
                    f"for a name with a colon add one: {item}:string"
                )
            if name in self.kept or name in OUTPUT_COLUMNS:
                raise InputError(f"the output would have two columns named {name!r}; leave it out of --keep")
            self.kept[name] = kind
            self.absent.add(name)

    @property
    def names(self) -> list[str]:
        """Every field to read, the text first."""
        return [self.text, *(name for name in self.kept if name != self.text)]

    def record(self, file: int, number: int, line: int, values: Mapping[str, Any]) -> Record:
        """Take the fields out of a record and check them."""
        text = values.get(self.text)
        problem = _problem_of(text, self.text, values)
        kept = []
        for name, kind in self.kept.items():
            value = values.get(name)
            if name in self.absent and name in values:
                self.absent.remove(name)
            try:
                kept.append(None if value is None else KEEP_TYPES[kind](value))
            except (ValueError, TypeError, OverflowError):
                problem = problem or f"field {name!r} is {_shorten(value)}, expected {kind}"
        return Record(file, number, line, None if problem else text, tuple(kept), problem)


def _problem_of(text: Any, name: str, values: Mapping[str, Any]) -> str:
    if isinstance(text, str):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"field {name!r} is not valid Unicode: lone surrogate at character {error.start}"
        return ""
    if name not in values:
        return f"there is no field {name!r}, only {_shorten(', '.join(map(str, values)))}"
    return f"field {name!r} is {_shorten(text)}, expected text"


def _shorten(value: Any) -> str:
    shown = "null" if value is None else value if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _string(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text.encode("utf-8")
    return text


def _int(value: Any) -> int:
    number = int(value)
    if isinstance(value, bool) or number not in _INT64 or (isinstance(value, float) and number != value):
        raise ValueError(value)
    return number


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(value)
    return float(value)


def _bool(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    try:
        return known[str(value).lower()]
    except KeyError:
        raise ValueError(value) from None


KEEP_TYPES: dict[str, Callable[[Any], Any]] = {"string": _string, "int": _int, "float": _float, "bool": _bool}
