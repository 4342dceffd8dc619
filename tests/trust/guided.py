"""A target under atheris: ``python -m tests.trust.guided TARGET -runs=N CORPUS``, libFuzzer's options behind it."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["m3e", "tests.trust.targets"]):
    from tests.trust.targets import CONTROLS, TARGETS

if __name__ == "__main__":
    name, *options = sys.argv[1:]
    atheris.Setup([sys.argv[0], *options], {**TARGETS, **CONTROLS}[name])
    atheris.Fuzz()
