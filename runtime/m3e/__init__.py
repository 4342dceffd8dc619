"""M3E sentence embeddings on ONNX Runtime. This is the public interface; every other name may move."""

from m3e.encoder import Encoder, PrecisionWarning, TruncationWarning
from m3e.errors import (
    BackendError,
    BundleError,
    CertificateError,
    CheckpointError,
    DependencyError,
    ExportError,
    InferenceError,
    InputError,
    M3EError,
    StartError,
)
from m3e.vectors import quantize_embeddings, similarity

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BundleError",
    "CertificateError",
    "CheckpointError",
    "DependencyError",
    "Encoder",
    "ExportError",
    "InferenceError",
    "InputError",
    "M3EError",
    "PrecisionWarning",
    "StartError",
    "TruncationWarning",
    "quantize_embeddings",
    "similarity",
]
