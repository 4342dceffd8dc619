"""The bundles being served: each with its tokenizer here and its graph in a worker, replaceable while requests run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m3e.aio import INLINE_CHARACTERS, JobAwaiter
from m3e.backends import choose_graph
from m3e.bundle import Bundle
from m3e.calibration import load_calibration
from m3e.errors import InputError, OverloadedError
from m3e.scheduler import Scheduler
from m3e.server.settings import Settings
from m3e.server.worker import DEFAULT_COMMAND, Worker
from m3e.token_queue import Job, Priority
from m3e.tokenizer import TokenIds, Tokenizer

Float32Array = npt.NDArray[np.float32]


class Model:
    """One opened bundle.

    Args:
        name: What clients call it.
        folder: The bundle.
        settings: Of the service.
        threads: For inference.
        tokenizing: Threads that tokenise long texts.
        awaiter: Where finished jobs go.
        observe_batch: Called after each batch with its texts, tokens and seconds.
        worker_command: See `m3e.server.worker.Worker`.

    Raises:
        BundleError: The bundle is missing or damaged.
        StartError: Its graph could not be opened, or its canary failed.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        settings: Settings,
        *,
        threads: int,
        tokenizing: Executor,
        awaiter: JobAwaiter,
        observe_batch: Callable[[int, int, float], None],
        worker_command: Sequence[str] = DEFAULT_COMMAND,
    ) -> None:
        self.name = name
        self.folder = folder
        bundle = Bundle(folder)
        self.manifest = bundle.manifest
        self.dim = self.manifest.model.embedding_dim
        self.max_seq_length = self.manifest.model.max_seq_length
        self.calibration = load_calibration(bundle.side_file(), self.manifest)
        self._tokenizer_json = bundle.read_tokenizer()
        self.tokenizer = Tokenizer(self._tokenizer_json, self.max_seq_length)
        self._tokenizing = tokenizing
        self._awaiter = awaiter
        self._timeout_s = settings.request_timeout_s
        self.worker = Worker(
            folder,
            precision=settings.precision,
            device=settings.device,
            threads=threads,
            max_batch_tokens=settings.max_batch_tokens,
            digest=self.manifest.digest,
            command=worker_command,
        )
        self.graph = choose_graph(bundle, self.worker.precision, self.worker.device)
        self.scheduler = Scheduler(
            self.worker.embedders(),
            dim=self.dim,
            max_batch_tokens=self.worker.max_batch_tokens,
            mixed=self.worker.mixed,
            max_queue_tokens=settings.max_queue_tokens,
            max_queue_ms=settings.max_queue_ms or None,
            deliver=awaiter.deliver,
            observe=observe_batch,
            check_idle=self.worker.check,
        )

    @property
    def ready(self) -> bool:
        """Whether a request would be run now."""
        return self.worker.alive

    @property
    def gives_token_vectors(self) -> bool:
        """Whether the graph has an output for every token."""
        return "last_hidden_state" in self.graph.outputs

    def prompt(self, name: str | None) -> str:
        """The prompt of a name, or the default one.

        Raises:
            InputError: There is none of that name.
        """
        model = self.manifest.model
        chosen = name if name is not None else model.default_prompt_name
        if chosen is None:
            return ""
        if chosen not in model.prompts:
            raise InputError(f"there is no such prompt; the model has {', '.join(model.prompts) or 'none'}")
        return model.prompts[chosen]

    async def tokenize(self, texts: Sequence[str]) -> TokenIds:
        """Tokenise: short texts at once, long ones in a thread, so that the event loop stays free."""
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return self.tokenizer(texts)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, self.tokenizer, texts)

    async def embed(self, input_ids: Sequence[list[int]], priority: Priority) -> Job:
        """Wait for the vectors of some token ids; errors as `m3e.aio.JobAwaiter.run`."""
        return await self._awaiter.run(self.scheduler, input_ids, priority=priority, timeout_s=self._timeout_s)

    def close(self, grace_s: float) -> None:
        """Finish what was accepted, then end the worker."""
        self.scheduler.close(timeout_s=grace_s)
        self.worker.close()


class Models:
    """All of them by name; the first answers where a request names none."""

    def __init__(self, open_model: Callable[[str, str], Model], bundles: Sequence[str], grace_s: float) -> None:
        self._open_model = open_model
        self._grace_s = grace_s
        self._folders = dict(name_and_folder(bundle) for bundle in bundles)
        if len(self._folders) < len(bundles):
            raise InputError("two bundles have the same name; give them as NAME=FOLDER")
        self._models: dict[str, Model] = {}
        self._reloading = threading.Lock()

    @property
    def names(self) -> list[str]:
        """What clients may ask for, also before it is open."""
        return list(self._folders)

    @property
    def ready(self) -> bool:
        """Whether every bundle is open and its worker answers."""
        return len(self._models) == len(self._folders) and all(model.ready for model in self._models.values())

    def overload(self) -> OverloadedError | None:
        """What a request would be refused with now, whichever bundle it is for; None if it might be let in."""
        refusals = [model.scheduler.overload() for model in self._models.values()]
        return refusals[0] if refusals and all(refusals) else None

    def opened(self) -> list[Model]:
        """The bundles that are open."""
        return list(self._models.values())

    def open_all(self) -> None:
        """Open every bundle, one after the other."""
        for name, folder in self._folders.items():
            self._models[name] = self._open_model(name, folder)

    def first(self) -> Model | None:
        """The default; None while it is being opened."""
        return next(iter(self._models.values()), None)

    def get(self, name: str) -> Model | None:
        """The bundle of a name."""
        return self._models.get(name)

    def reload(self, name: str) -> None:
        """Open a bundle's folder again and, once its canary agrees, put it in the place of the old one.

        Requests that the old one accepted are finished by it. If the new one cannot be opened the old one stays.

        Raises:
            BundleError: As opening does.
            StartError: As opening does.
        """
        with self._reloading:
            old, new = self._models[name], self._open_model(name, self._folders[name])
            self._models[name] = new
            old.close(self._grace_s)

    def close(self) -> None:
        """Close them all."""
        for model in self._models.values():
            model.close(self._grace_s)


def name_and_folder(bundle: str) -> tuple[str, str]:
    """Split ``NAME=FOLDER``; a folder alone is named by its last part."""
    name, separator, folder = bundle.partition("=")
    return (name, folder) if separator else (Path(bundle).resolve().name, bundle)
