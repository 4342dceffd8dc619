"""M3E sentence embeddings on ONNX Runtime. This is the public interface; every other name may move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m3e.encoder import Encoder, PrecisionWarning, TruncationWarning
from m3e.errors import (
    BackendError,
    BundleError,
    CertificateError,
    CheckpointError,
    ClosedError,
    DeadlineError,
    DependencyError,
    ExportError,
    InferenceError,
    InputError,
    M3EError,
    OverloadedError,
    QueueError,
    StartError,
    WorkerLostError,
)
from m3e.vectors import quantize_embeddings, similarity

if TYPE_CHECKING:
    from m3e.aio import AsyncEncoder
    from m3e.batcher import Batcher

__version__ = "0.1.0"

__all__ = [
    "AsyncEncoder",
    "BackendError",
    "Batcher",
    "BundleError",
    "CertificateError",
    "CheckpointError",
    "ClosedError",
    "DeadlineError",
    "DependencyError",
    "Encoder",
    "ExportError",
    "InferenceError",
    "InputError",
    "M3EError",
    "OverloadedError",
    "PrecisionWarning",
    "QueueError",
    "StartError",
    "TruncationWarning",
    "WorkerLostError",
    "quantize_embeddings",
    "similarity",
]

# Imported on first use: asyncio alone takes a fifth of the time that the rest does.
_ON_FIRST_USE = {"AsyncEncoder": "m3e.aio", "Batcher": "m3e.batcher"}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'm3e' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ON_FIRST_USE[name]), name)
