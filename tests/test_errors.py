"""The family of errors: its drawing, its exports, and the builtins that callers may catch instead."""

from __future__ import annotations

import re

import pytest

import m3e
from m3e import errors

CLASSES = {name: value for name, value in vars(errors).items() if isinstance(value, type)}


def drawn() -> dict[str, str | None]:
    """Each name in the module docstring's tree with the name it hangs from."""
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if (match := re.match(r"    ([ │├└─]*)(\w+Error)\b", line)) is None:
            continue
        depth, name = len(match[1]), match[2]
        above = [(column, parent) for column, parent in above if column < depth]
        parents[name] = above[-1][1] if above else None
        above.append((depth, name))
    return parents


def test_the_drawing_is_the_class_tree() -> None:
    actual = {name: next((base.__name__ for base in value.__bases__ if base.__name__ in CLASSES), None)
              for name, value in CLASSES.items()}  # fmt: skip
    assert drawn() == actual


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_exported_documented_and_of_the_family(name: str) -> None:
    assert getattr(m3e, name) is CLASSES[name]
    assert name in m3e.__all__
    assert issubclass(CLASSES[name], m3e.M3EError)
    assert CLASSES[name].__doc__


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        pytest.param(m3e.InputError, ValueError, id="InputError"),
        pytest.param(m3e.DependencyError, ImportError, id="DependencyError"),
    ],
)
def test_an_error_that_is_a_builtin_too(error: type[Exception], builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="what was received"):
        raise error("what was received")


def test_no_other_error_is_a_builtin() -> None:
    builtin = {name for name, value in CLASSES.items() if issubclass(value, (ValueError, ImportError, OSError))}
    assert builtin == {"InputError", "DependencyError"}
