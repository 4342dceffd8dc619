"""The graph of a bundle that runs now: chosen, opened, checked, reopened after a fork, replaced by its engines."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path

from m3e.backends import AnySession, Engines, choose_graph, open_session
from m3e.bundle import Bundle
from m3e.canary import check_canary
from m3e.errors import BundleError, StartError
from m3e.providers import CUDA, has_provider
from m3e.tensorrt_session import EngineBuild
from m3e.tokenizer import Tokenizer


class RunningGraph:
    """A bundle's graph on a device. Threads may share one.

    Args:
        bundle: The bundle.
        tokenizer: The bundle's own, for the golden texts.
        precision: As `m3e.backends.choose_graph` takes it.
        device: Of `m3e.backends.DEVICES`.
        device_id: Which card.
        num_threads: Threads on the CPU.
        max_memory_mb: As for `m3e.Encoder`.
        engine_cache: Folder for TensorRT's engines; None for one of the user's own.

    Attributes:
        graph: What the manifest says of it.
        device: ``cpu``, ``cuda`` or ``tensorrt``.
        session: Runs batches; in a process that may have been forked, take it from `session_here`.
        engine_build: The engines that are being built, or None.

    Raises:
        BundleError: The bundle is damaged or has no graph for the device.
        StartError: onnxruntime refuses the graph, or the golden texts come out different.
        DependencyError: onnxruntime, or its provider, is not installed.

    Warns:
        RuntimeWarning: ``auto`` takes the CPU though this onnxruntime has CUDA.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        *,
        precision: str,
        device: str,
        device_id: int,
        num_threads: int,
        max_memory_mb: int | None,
        engine_cache: Path | None,
    ) -> None:
        self._folder, self._manifest, self._tokenizer = bundle.folder, bundle.manifest, tokenizer
        self._device_id, self._num_threads, self._max_memory_mb = device_id, num_threads, max_memory_mb
        self._opening = threading.Lock()
        self.engine_build: EngineBuild | None = None
        if device == "auto":
            device = "cpu"
            if has_provider(CUDA):
                try:
                    self._start(bundle, precision, "cuda", engine_cache)
                    return
                except (BundleError, StartError) as error:
                    warnings.warn(f"device='auto' takes the CPU, not CUDA: {error}", RuntimeWarning, stacklevel=3)
        self._start(bundle, precision, device, engine_cache)

    def session_here(self) -> AnySession:
        """The session, reopened if this is a forked child: onnxruntime's threads do not survive a fork.

        Raises:
            BundleError: In a child: the bundle is gone or damaged.
            StartError: In a child: the folder holds another bundle by now.
        """
        if self._process != os.getpid():
            with self._opening:
                if self._process != os.getpid():
                    bundle = Bundle(self._folder)
                    if bundle.manifest.digest != self._manifest.digest:
                        raise StartError(
                            f"{str(self._folder)!r} holds another bundle than before the fork; open it anew"
                        )
                    self.session.abandon()
                    self._open(bundle)
        return self.session

    def _start(self, bundle: Bundle, precision: str, device: str, engine_cache: Path | None) -> None:
        """Open a session on a device and check it."""
        self.device, self.graph = device, choose_graph(bundle, precision, device)
        if device == "tensorrt":
            self._open_engines(bundle, engine_cache)
        else:
            self._open(bundle)
        check_canary(self._manifest, self.graph, self._tokenizer, self.session)

    def _open(self, bundle: Bundle) -> None:
        self.session = open_session(
            bundle, self.graph, device=self.device, device_id=self._device_id, num_threads=self._num_threads,
            max_memory_mb=self._max_memory_mb,
        )  # fmt: skip
        self._process = os.getpid()

    def _open_engines(self, bundle: Bundle, engine_cache: Path | None) -> None:
        """Open TensorRT's engines, or serve with CUDA while they are built."""
        target = self.graph
        engines = Engines(bundle, target, device_id=self._device_id, cache=engine_cache)
        found = engines.find()
        self._process = os.getpid()
        if found is not None:
            self.session = found
            return
        self.graph, self.device = choose_graph(bundle, "auto", "cuda"), "cuda"
        self._open(bundle)

        def swap(session: AnySession) -> None:
            # Calls that are under way keep the session that they began with.
            self.session, self.graph, self.device = session, target, "tensorrt"

        self.engine_build = EngineBuild(
            engines.build, lambda session: check_canary(self._manifest, target, self._tokenizer, session), swap
        )
