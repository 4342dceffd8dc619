"""Every error that m3e raises on purpose.

    M3EError
    ├── InputError          a text, an argument or an option (also a ValueError)
    ├── BundleError         what is on disk: missing, damaged, of another version
    ├── BackendError        onnxruntime, split by when it failed
    │   ├── StartError          a session could not be opened, or its canary failed
    │   └── InferenceError      a batch failed, or gave a number that is not finite
    │       └── WorkerLostError     the process that ran it died or stopped answering
    ├── QueueError          a request that waited, or would have, among those of other callers
    │   ├── OverloadedError     the queue is full; says when to come back
    │   ├── DeadlineError       its time ran out
    │   └── ClosedError         the service is shutting down
    ├── DependencyError     a package that this call needs is not installed (also an ImportError)
    └── ExportError         a conversion
        ├── CheckpointError     what was given to convert
        └── CertificateError    the bundle does not agree with its reference

A message says what was received, what was expected and what to do.
"""

from __future__ import annotations


class M3EError(Exception):
    """Base class of every error here; catch it to catch them all."""


class InputError(M3EError, ValueError):
    """A text, an argument or an option cannot be used."""


class BundleError(M3EError):
    """A bundle is missing, damaged, or of a version that this runtime does not read."""


class BackendError(M3EError):
    """Onnxruntime could not do its work."""


class StartError(BackendError):
    """A session could not be opened, or does not reproduce the bundle's golden vectors."""


class InferenceError(BackendError):
    """A batch failed while it ran, or its vectors are not finite."""


class WorkerLostError(InferenceError):
    """The process that ran a batch died, or did not answer in time and was ended."""


class QueueError(M3EError):
    """A request could not be answered among those of other callers."""


class OverloadedError(QueueError):
    """The queue is full.

    Attributes:
        retry_after_s: Seconds after which there will probably be room.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(QueueError):
    """A request's time ran out before it was answered."""


class ClosedError(QueueError):
    """The service is closing, or closed, and takes no more requests."""


class DependencyError(M3EError, ImportError):
    """A package that this call needs is not installed."""


class ExportError(M3EError):
    """A conversion failed; nothing was published."""


class CheckpointError(ExportError):
    """A checkpoint cannot be read, or is of a kind that is not supported."""


class CertificateError(ExportError):
    """The converted bundle does not agree with its reference."""
