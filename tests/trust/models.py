"""One checkpoint and one bundle of it for all harnesses, made once; children find their parent's."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from benchmarks.checkpoints import write_checkpoint
from m3e_export.pipeline import convert

_VARIABLE = "M3E_TRUST_MODELS"


@functools.cache
def _folder() -> Path:
    known = os.environ.get(_VARIABLE)
    if known is not None:
        return Path(known)
    folder = Path(tempfile.mkdtemp(prefix="m3e-trust-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[_VARIABLE] = str(folder)
    return folder


def tiny_checkpoint() -> Path:
    """M3E's shape with two layers of 64 and random weights, M3E's vocabulary size."""
    return _checkpoint("tiny")


def tiny_bundle() -> Path:
    """Its bundle, FP32 and INT8."""
    return _bundle("tiny")


def small_bundle() -> Path:
    """M3E-small's shape with random weights, FP32 and INT8: for what is a matter of time."""
    return _bundle("small")


def _checkpoint(shape: str) -> Path:
    folder = _folder() / f"m3e-{shape}"
    return folder if folder.exists() else write_checkpoint(folder, shape)


def _bundle(shape: str) -> Path:
    target = _folder() / f"bundle-{shape}"
    if not target.exists():
        convert(str(_checkpoint(shape)), target, precisions=("fp32", "int8"))
    return target
