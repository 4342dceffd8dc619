"""M3E sentence embeddings on ONNX Runtime. This is the public interface; every other name may move."""

from m3e.aio import AsyncEncoder
from m3e.batcher import Batcher
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
