"""Arguments that are numbers, held to their bounds."""

from __future__ import annotations

import operator

from m3e.errors import InputError


def check_integer(name: str, value: object, lowest: int = 1, highest: int | None = None) -> int:
    """Give an argument as an int; numpy's integers are some too, True and 8.0 are none.

    Args:
        name: What the caller knows it by.
        value: What came.
        lowest: Least value allowed.
        highest: Greatest value allowed; None for no bound.

    Raises:
        InputError: It is no integer, or out of its bounds.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise InputError(f"{name} is {value!r}, expected an integer")
    if number < lowest or (highest is not None and number > highest):
        bounds = f"at least {lowest}" if highest is None else f"{lowest} to {highest}"
        raise InputError(f"{name} is {number}, expected {bounds}")
    return number
