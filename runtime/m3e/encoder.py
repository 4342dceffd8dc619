"""Texts -> vectors: tokenise, plan batches, run them, put the rows back in order."""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.backends import DEVICES, AnySession, Engines, choose_graph, open_session
from m3e.bundle import Bundle
from m3e.canary import check_canary
from m3e.cpu import available_threads
from m3e.errors import BundleError, InputError, StartError
from m3e.feeds import pad
from m3e.manifest import decode_array
from m3e.overlap import ahead
from m3e.progress import progress_bar
from m3e.providers import CUDA, has_provider
from m3e.tensorrt_session import EngineBuild
from m3e.tokenizer import TokenIds, Tokenizer, check_texts
from m3e.vectors import EmbeddingPrecision, Float32Array, normalize, quantize_embeddings, similarity


class TruncationWarning(UserWarning):
    """Some texts were longer than the model's ``max_seq_length`` and were cut."""


class Encoder:
    """A bundle, opened. Threads may share one; a forked child opens its own session on first use.

    Opening checks the bundle, then embeds its golden texts and compares: a machine that would give other vectors
    is found before it serves any.

    Args:
        bundle: Folder written by ``convert.py``.
        precision: Which graph: ``fp32``, or ``auto`` for the fastest that the bundle has for this device.
        device: ``cpu``, ``cuda``, ``tensorrt``, or ``auto``: CUDA where it can be used, otherwise the CPU. Where
            TensorRT's engines must be built first, CUDA serves meanwhile; see `engine_build`.
        num_threads: Threads of one batch on the CPU; None for what affinity and the container's quota allow.
        device_id: Which card, for ``cuda`` and ``tensorrt``.
        engine_cache: Folder for TensorRT's engines; None for one of the user's own.

    Attributes:
        engine_build: The engines that are being built, or None: its ``state`` says how far they are, its ``wait()``
            waits for them.

    Raises:
        BundleError: The bundle is missing, damaged or lacks the precision.
        StartError: onnxruntime refuses the graph, or the golden texts come out different.
        DependencyError: onnxruntime is not installed.
        InputError: Another device or number of threads.

    Warns:
        RuntimeWarning: ``auto`` takes the CPU though this onnxruntime has CUDA; or CUDA graphs cannot be used.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        precision: str = "auto",
        device: str = "cpu",
        num_threads: int | None = None,
        device_id: int = 0,
        engine_cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if device not in DEVICES:
            raise InputError(f"device is {device!r}, expected one of {', '.join(map(repr, DEVICES))}")
        if num_threads is not None and num_threads < 1:
            raise InputError(f"num_threads is {num_threads}, expected at least 1")
        self._arguments = {
            "precision": precision, "device": device, "num_threads": num_threads,
            "device_id": device_id, "engine_cache": engine_cache,
        }  # fmt: skip
        self._device_id = device_id
        self._folder = Path(bundle)
        opened = Bundle(self._folder)
        self.manifest = opened.manifest
        self.num_threads = num_threads or available_threads()
        self._tokenizer = Tokenizer(opened.read("tokenizer.json"), self.manifest.model.max_seq_length)
        self._opening = threading.Lock()
        self.engine_build: EngineBuild | None = None
        cache = None if engine_cache is None else Path(engine_cache)
        if device != "auto":
            self._start(opened, precision, device, cache)
            return
        if has_provider(CUDA):
            try:
                self._start(opened, precision, "cuda", cache)
                return
            except (BundleError, StartError) as error:
                warnings.warn(f"device='auto' takes the CPU, not CUDA: {error}", RuntimeWarning, stacklevel=2)
        self._start(opened, precision, "cpu", cache)

    def encode(
        self,
        sentences: str | Sequence[str] | npt.NDArray[np.str_],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str = "sentence_embedding",
        precision: EmbeddingPrecision = "float32",
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> npt.NDArray[Any]:
        """Embed texts. Names, order and meaning of the arguments are sentence-transformers'.

        Args:
            sentences: A text, or a list, tuple or array of texts.
            prompt_name: Put the prompt of this name before every text.
            prompt: Put this before every text.
            batch_size: At most this many texts in a batch; None leaves it to the token budget, which is faster.
            show_progress_bar: True or False; None shows it on a terminal when the call takes longer than a second.
            output_value: ``sentence_embedding``.
            precision: ``float32``, or quantised with the bundle's fixed ranges: ``int8``, ``uint8``, ``binary``,
                ``ubinary``.
            normalize_embeddings: Scale vectors to unit length, after truncation.
            truncate_dim: Keep the first dimensions only.

        Returns:
            float32 (n, dim), or the quantised type; (dim,) for a single text; (0, dim) for an empty list.

        Raises:
            InputError: A text or an argument cannot be used; the message says which.
            InferenceError: The model failed.

        Warns:
            TruncationWarning: Texts longer than ``max_seq_length`` tokens were cut.
        """
        if output_value != "sentence_embedding":
            raise InputError(f"output_value is {output_value!r}, expected 'sentence_embedding'")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, expected at least 1")
        single = isinstance(sentences, str)
        texts = check_texts([sentences] if isinstance(sentences, str) else sentences)
        session = self._session_here()
        embeddings = np.empty((len(texts), self.manifest.model.embedding_dim), dtype=np.float32)
        with progress_bar(len(texts), "text", show_progress_bar) as progress:
            for rows, vectors in self._run(session, self._with_prompt(texts, prompt_name, prompt), batch_size):
                embeddings[rows] = vectors
                progress.update(len(rows))
        finished = self._finish(embeddings, precision, normalize_embeddings, truncate_dim)
        return finished[0] if single else finished

    def encode_query(self, sentences: str | Sequence[str], **arguments: Any) -> npt.NDArray[Any]:
        """Embed search queries: `encode` with the prompt named ``query``, if the model has one."""
        return self.encode(sentences, **self._default_prompt(("query",), arguments))

    def encode_document(self, sentences: str | Sequence[str], **arguments: Any) -> npt.NDArray[Any]:
        """Embed what is searched: `encode` with the prompt named ``document``, ``passage`` or ``corpus``, if any."""
        return self.encode(sentences, **self._default_prompt(("document", "passage", "corpus"), arguments))

    def encode_iter(
        self, sentences: Iterable[str], *, window: int = 4096, **arguments: Any
    ) -> Iterator[npt.NDArray[Any]]:
        """Embed a stream of texts without holding more than one window of it.

        Args:
            sentences: Any iterable, also one that never ends.
            window: Texts that are read, sorted by length and embedded together.
            **arguments: Those of `encode`.

        Yields:
            (dim,) for each text, in order.
        """
        if window < 1:
            raise InputError(f"window is {window}, expected at least 1")
        stream = iter(sentences)
        while texts := list(itertools.islice(stream, window)):
            yield from self.encode(texts, **arguments)

    def similarity(self, a: npt.ArrayLike, b: npt.ArrayLike) -> Float32Array:
        """Compare every vector of a (n, dim) with every one of b (m, dim) by the model's function: float32 (n, m)."""
        return similarity(a, b, self.manifest.model.similarity_fn_name)

    def tokenize(self, sentences: str | Sequence[str]) -> dict[str, npt.NDArray[np.int64]]:
        """Give the graph's inputs for some texts: ``input_ids`` and ``attention_mask``, int64 (n, seq_len)."""
        texts = check_texts([sentences] if isinstance(sentences, str) else sentences)
        if not texts:
            empty = np.zeros((0, 0), dtype=np.int64)
            return {"input_ids": empty, "attention_mask": empty}
        return pad(self._tokenizer(texts).input_ids)

    def count_tokens(self, sentences: Sequence[str]) -> npt.NDArray[np.int64]:
        """Count the tokens of texts before truncation, special tokens included: int64 (n,)."""
        return self._tokenizer(check_texts(sentences)).n_tokens_full

    @property
    def max_seq_length(self) -> int:
        """The longest input in tokens, special tokens included."""
        return self._tokenizer.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        limit = self.manifest.model.max_seq_length
        if not 3 <= value <= limit:
            raise InputError(f"max_seq_length is {value}, expected 3 to {limit}")
        self._tokenizer.max_seq_length = value

    @property
    def device(self) -> str:
        """What runs the batches now: ``cpu``, ``cuda`` or ``tensorrt``."""
        return self._session.device

    @property
    def precision(self) -> str:
        """The precision of the graph that runs."""
        return self._graph.precision

    @property
    def prompts(self) -> Mapping[str, str]:
        """The model's prompts by name."""
        return self.manifest.model.prompts

    def get_sentence_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.manifest.model.embedding_dim

    def _run(
        self, session: AnySession, texts: list[str], batch_size: int | None
    ) -> Iterator[tuple[npt.NDArray[np.intp], Float32Array]]:
        """Give the vectors batch by batch, each with its rows; on a GPU the next texts are tokenised meanwhile."""
        cut = _Cut(self.max_seq_length)

        def batches(texts: list[str], window: int) -> Iterator[tuple[npt.NDArray[np.intp], list[list[int]]]]:
            windows = [texts[start : start + window] for start in range(0, len(texts), window)]
            start = 0
            for tokens in ahead(self._tokenizer, windows) if len(windows) > 1 else map(self._tokenizer, windows):
                cut.add(tokens)
                for rows in session.plan(tokens.n_tokens, batch_size):
                    yield rows + start, [tokens.input_ids[row] for row in rows]
                start += len(tokens.n_tokens)

        def run(batch: tuple[npt.NDArray[np.intp], list[list[int]]]) -> tuple[npt.NDArray[np.intp], Float32Array]:
            return batch[0], session.run(batch[1])

        planned = batches(texts, session.window or max(1, len(texts)))
        yield from ahead(run, planned, session.threads) if session.threads > 1 and len(texts) > 1 else map(run, planned)
        cut.warn()

    def _start(self, bundle: Bundle, precision: str, device: str, cache: Path | None) -> None:
        """Open a session on a device and check it."""
        self._device, self._graph = device, choose_graph(bundle, precision, device)
        if device == "tensorrt":
            self._open_engines(bundle, cache)
        else:
            self._open(bundle)
        check_canary(self.manifest, self._graph, self._tokenizer, self._session)

    def _open(self, bundle: Bundle) -> None:
        self._session = open_session(
            bundle, self._graph, device=self._device, device_id=self._device_id, num_threads=self.num_threads
        )
        self._process = os.getpid()

    def _open_engines(self, bundle: Bundle, cache: Path | None) -> None:
        """Open TensorRT's engines, or serve with CUDA while they are built."""
        target = self._graph
        engines = Engines(bundle, target, device_id=self._device_id, cache=cache)
        found = engines.find()
        self._process = os.getpid()
        if found is not None:
            self._session = found
            return
        self._graph, self._device = choose_graph(bundle, "auto", "cuda"), "cuda"
        self._open(bundle)

        def swap(session: AnySession) -> None:
            # Calls that are under way keep the session that they began with.
            self._session, self._graph, self._device = session, target, "tensorrt"

        self.engine_build = EngineBuild(
            engines.build, lambda session: check_canary(self.manifest, target, self._tokenizer, session), swap
        )

    def _session_here(self) -> AnySession:
        """The session, reopened if this is a forked child: onnxruntime's threads do not survive a fork."""
        if self._process != os.getpid():
            with self._opening:
                if self._process != os.getpid():
                    self._session.abandon()
                    self._open(Bundle(self._folder))
        return self._session

    def _with_prompt(self, texts: list[str], prompt_name: str | None, prompt: str | None) -> list[str]:
        model = self.manifest.model
        if prompt is None:
            name = model.default_prompt_name if prompt_name is None else prompt_name
            if name is not None and name not in model.prompts:
                available = ", ".join(map(repr, model.prompts)) or "none"
                raise InputError(f"there is no prompt named {name!r}; the bundle has {available}")
            prompt = "" if name is None else model.prompts[name]
        return [prompt + text for text in texts] if prompt else texts

    def _default_prompt(self, names: Sequence[str], arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments.get("prompt") is None and arguments.get("prompt_name") is None:
            return {**arguments, "prompt_name": next((name for name in names if name in self.prompts), None)}
        return arguments

    def _finish(
        self,
        embeddings: Float32Array,
        precision: EmbeddingPrecision,
        normalize_embeddings: bool,
        truncate_dim: int | None,
    ) -> npt.NDArray[Any]:
        dim = self.manifest.model.embedding_dim
        if truncate_dim is not None:
            if not 1 <= truncate_dim <= dim:
                raise InputError(f"truncate_dim is {truncate_dim}, expected 1 to {dim}")
            embeddings = embeddings[:, :truncate_dim]
        if normalize_embeddings:
            embeddings = normalize(embeddings)
        if precision == "float32":
            return embeddings
        ranges = None
        if precision in ("int8", "uint8"):
            if normalize_embeddings and truncate_dim not in (None, dim):
                raise InputError(
                    f"the bundle has no ranges for {precision} vectors that are truncated and then normalised; "
                    "leave one of the two out, or call m3e.quantize_embeddings with ranges of your own"
                )
            unit = normalize_embeddings or self.manifest.model.normalize
            text = self.manifest.unit_embedding_ranges if unit else self.manifest.embedding_ranges
            ranges = decode_array(text, (2, dim))[:, :truncate_dim]
        return quantize_embeddings(embeddings, precision, ranges)

    def __repr__(self) -> str:
        return f"Encoder({str(self._folder)!r}, precision={self.precision!r}, num_threads={self.num_threads})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._folder, self._arguments)


def _reopen(folder: Path, arguments: dict[str, Any]) -> Encoder:
    return Encoder(folder, **arguments)


class _Cut:
    """Texts that were too long, counted over windows."""

    def __init__(self, max_seq_length: int) -> None:
        self._max_seq_length = max_seq_length
        self._seen = self._count = 0
        self._first: tuple[int, int] | None = None

    def add(self, tokens: TokenIds) -> None:
        """Count the next texts."""
        cut = np.flatnonzero(tokens.n_tokens_full > tokens.n_tokens)
        if len(cut) and self._first is None:
            self._first = self._seen + int(cut[0]), int(tokens.n_tokens_full[cut[0]])
        self._count += len(cut)
        self._seen += len(tokens.n_tokens)

    def warn(self) -> None:
        """Warn if there were any."""
        if self._first is not None:
            warnings.warn(
                f"{self._count} of {self._seen} texts are longer than {self._max_seq_length} tokens and were cut "
                f"(the first is text {self._first[0]} with {self._first[1]} tokens); split them to embed all",
                TruncationWarning,
                stacklevel=4,
            )
