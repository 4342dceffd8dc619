"""One checkpoint and one bundle of it for all harnesses, made once a process tree."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from benchmarks.checkpoints import write_checkpoint
from m3e_export.pipeline import convert


@functools.cache
def tiny_checkpoint() -> Path:
    """M3E's shape with two layers of 64 and random weights, M3E's vocabulary size."""
    folder = Path(tempfile.mkdtemp(prefix="m3e-trust-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_checkpoint(folder / "m3e-tiny")


@functools.cache
def tiny_bundle() -> Path:
    """Its bundle, FP32 and INT8."""
    target = tiny_checkpoint().parent / "bundle"
    convert(str(tiny_checkpoint()), target, precisions=("fp32", "int8"))
    return target
