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
    folder = _folder() / "m3e-tiny"
    return folder if folder.exists() else write_checkpoint(folder)


def tiny_bundle() -> Path:
    """Its bundle, FP32 and INT8."""
    target = _folder() / "bundle"
    if not target.exists():
        convert(str(tiny_checkpoint()), target, precisions=("fp32", "int8"))
    return target
