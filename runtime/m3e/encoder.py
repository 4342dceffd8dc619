"""Texts -> vectors: tokenise, plan batches, run them, put the rows back in order."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.backends import DEVICES, AnySession
from m3e.backends import PrecisionWarning as PrecisionWarning
from m3e.bundle import Bundle
from m3e.cache import obtain
from m3e.calibration import load_calibration
from m3e.checks import check_integer
from m3e.cpu import available_threads
from m3e.errors import InputError
from m3e.feeds import pad
from m3e.finish import finish
from m3e.overlap import Workers
from m3e.progress import progress_bar
from m3e.prompts import find_prompt, with_prompt_of
from m3e.running import RunningGraph
from m3e.session import Session
from m3e.tensorrt_session import EngineBuild
from m3e.tokenizer import TokenIds, Tokenizer, check_texts
from m3e.truncation import Truncations
from m3e.truncation import TruncationWarning as TruncationWarning
from m3e.vectors import EmbeddingPrecision, Float32Array, similarity

Rows = npt.NDArray[np.intp]


class Encoder:
    """A bundle, opened. Threads may share one; a forked child opens its own session on first use.

    Opening checks the bundle, then embeds its golden texts and compares: a machine that would give other vectors
    is found before it serves any.

    Args:
        bundle: Folder written by ``convert.py``, or a hub id such as ``moka-ai/m3e-base``, which is converted into the
            cache on first use if the exporter is installed (``m3e pull`` does it ahead of time).
        precision: Which graph: ``fp32``, ``int8``, ``fp16``, the name of a graph's file, or ``auto`` for the fastest
            that the bundle has for this device and processor.
        device: ``cpu``, ``cuda``, ``tensorrt``, or ``auto``: CUDA where it can be used, otherwise the CPU. Where
            TensorRT's engines must be built first, CUDA serves meanwhile; see `engine_build`.
        num_threads: Threads on the CPU, together for a batch that runs alone, one each for batches side by side; None
            for what affinity and the container's quota allow.
        max_memory_mb: Bound in MiB on what the graph and its batches take on the CPU, beside Python and its libraries.
            Where it is too tight for batches side by side they run one after the other. None for no bound; then weights
            beyond 256 MiB are not opened twice.
        device_id: Which card, for ``cuda`` and ``tensorrt``.
        engine_cache: Folder for TensorRT's engines; None for one of the user's own.
        revision: Of a hub id: branch or tag as it was when it was pulled, or a commit; None for the hub's default.

    Raises:
        BundleError: The bundle is missing, damaged or lacks the precision.
        StartError: onnxruntime refuses the graph, or the golden texts come out different.
        DependencyError: onnxruntime is not installed; or a hub id is not in the cache and the exporter not installed.
        ExportError: A hub id cannot be converted.
        InputError: Another device or number of threads; or ``max_memory_mb`` is too little for one text.

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
        max_memory_mb: int | None = None,
        device_id: int = 0,
        engine_cache: str | os.PathLike[str] | None = None,
        revision: str | None = None,
    ) -> None:
        if device not in DEVICES:
            raise InputError(f"device is {device!r}, expected one of {', '.join(map(repr, DEVICES))}")
        if num_threads is not None:
            num_threads = check_integer("num_threads", num_threads)
        if max_memory_mb is not None:
            max_memory_mb = check_integer("max_memory_mb", max_memory_mb)
        if max_memory_mb is not None and device in ("cuda", "tensorrt"):
            raise InputError(f"max_memory_mb bounds what runs on the CPU; device is {device!r}")
        self._arguments: dict[str, Any] = {
            "precision": precision, "device": device, "num_threads": num_threads, "max_memory_mb": max_memory_mb,
            "device_id": device_id, "engine_cache": engine_cache,
        }  # fmt: skip
        self._folder = obtain(bundle, revision, precision)
        opened = Bundle(self._folder)
        self.manifest = opened.manifest
        self.num_threads = num_threads or available_threads()
        self._tokenizer = Tokenizer(opened.read_tokenizer(), self.manifest.model.max_seq_length)
        self.calibration = load_calibration(opened.side_file(), self.manifest)
        self._running = RunningGraph(
            opened,
            self._tokenizer,
            precision=precision,
            device=device,
            device_id=device_id,
            num_threads=self.num_threads,
            max_memory_mb=max_memory_mb,
            engine_cache=None if engine_cache is None else Path(engine_cache),
        )

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
        if batch_size is not None:
            batch_size = check_integer("batch_size", batch_size)
        single = isinstance(sentences, str)
        texts = check_texts([sentences] if isinstance(sentences, str) else sentences)
        session = self._running.session_here()
        embeddings = np.empty((len(texts), self.manifest.model.embedding_dim), dtype=np.float32)
        with progress_bar(len(texts), "text", show_progress_bar) as progress:
            for rows, vectors in self._run(
                session, texts, find_prompt(self.manifest.model, prompt_name, prompt), batch_size
            ):
                embeddings[rows] = vectors
                progress.update(len(rows))
        finished = finish(
            embeddings,
            self.manifest,
            precision=precision,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
        )
        return finished[0] if single else finished

    def encode_query(self, sentences: str | Sequence[str], **arguments: Any) -> npt.NDArray[Any]:
        """Embed search queries: `encode` with the prompt named ``query``, if the model has one."""
        return self.encode(sentences, **with_prompt_of(self.manifest.model, ("query",), arguments))

    def encode_document(self, sentences: str | Sequence[str], **arguments: Any) -> npt.NDArray[Any]:
        """Embed what is searched: `encode` with the prompt named ``document``, ``passage`` or ``corpus``, if any."""
        return self.encode(
            sentences, **with_prompt_of(self.manifest.model, ("document", "passage", "corpus"), arguments)
        )

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
        window = check_integer("window", window)
        if isinstance(sentences, str):
            raise InputError("sentences is a str, whose characters would be the texts; put it into a list")
        stream = iter(sentences)
        while texts := list(itertools.islice(stream, window)):
            yield from self.encode(texts, **arguments)

    def similarity(self, a: npt.ArrayLike, b: npt.ArrayLike, *, calibrated: bool = False) -> Float32Array:
        """Compare every vector of a (n, dim) with every one of b (m, dim) by the model's function: float32 (n, m).

        Args:
            a: (n, dim) or (dim,).
            b: (m, dim) or (dim,).
            calibrated: Give the probability that two texts mean the same, as ``m3e calibrate`` learnt it, instead of
                the bare number.

        Raises:
            InputError: Other shapes, or ``calibrated`` and the bundle was never calibrated.
        """
        scores = similarity(a, b, self.manifest.model.similarity_fn_name)
        if not calibrated:
            return scores
        if self.calibration is None:
            raise InputError(f"{str(self._folder)!r} is not calibrated; run: m3e calibrate {self._folder} PAIRS.tsv")
        return self.calibration(scores)

    def tokenize(self, sentences: str | Sequence[str]) -> dict[str, npt.NDArray[np.int64]]:
        """Give the graph's inputs for some texts: ``input_ids`` and ``attention_mask``, int64 (n, seq_len)."""
        texts = check_texts([sentences] if isinstance(sentences, str) else sentences)
        if not texts:
            empty = np.zeros((0, 0), dtype=np.int64)
            return {"input_ids": empty, "attention_mask": empty}
        return pad(self._tokenizer(texts).input_ids)

    def count_tokens(self, sentences: Sequence[str], *, exact: bool = True) -> npt.NDArray[np.int64]:
        """Count the tokens of texts before truncation, special tokens included: int64 (n,).

        Args:
            sentences: The texts.
            exact: False counts a very long text only so far as to know that it is longer than ``max_seq_length``:
                milliseconds for megabytes, which are seconds to count whole.
        """
        texts = check_texts(sentences)
        return self._tokenizer.count(texts) if exact else self._tokenizer(texts).n_tokens_full

    def tokenize_batch(
        self, sentences: Sequence[str], prompt_name: str | None = None, prompt: str | None = None
    ) -> TokenIds:
        """Do the first half of `encode`: check texts, put the prompt before each, tokenise, truncate.

        Raises:
            InputError: As `encode`.

        Warns:
            TruncationWarning: As `encode`.
        """
        texts = check_texts(sentences)
        prompt = find_prompt(self.manifest.model, prompt_name, prompt)
        if self._prompt_length(prompt):
            raise InputError(
                "this model does not pool its prompts, which takes batches of one prompt; use Encoder.encode for it"
            )
        tokens = self._tokenizer([prompt + text for text in texts] if prompt else texts)
        truncations = Truncations(self.max_seq_length)
        truncations.add(tokens)
        truncations.warn(stacklevel=3)
        return tokens

    def embed(self, input_ids: Sequence[list[int]]) -> Float32Array:
        """Do the second half of `encode`: plan batches of token ids and run them.

        Args:
            input_ids: Ids of each text as `tokenize_batch` gives them.

        Returns:
            float32 (n, dim), in order, as the graph gives them.

        Raises:
            InferenceError: The model failed.
        """
        session = self._running.session_here()
        n_tokens = np.array([len(ids) for ids in input_ids], dtype=np.int64)
        embeddings = np.empty((len(input_ids), self.manifest.model.embedding_dim), dtype=np.float32)
        for rows in session.plan(n_tokens):
            embeddings[rows] = session.run([input_ids[row] for row in rows])
        return embeddings

    def embed_tokens(self, input_ids: list[int]) -> Float32Array:
        """Give a vector for every token of one text, not normalised.

        Returns:
            float32 (tokens, hidden_size).

        Raises:
            InferenceError: The model failed.
            InputError: The graph gives no such vectors.
        """
        session = self._running.session_here()
        if "last_hidden_state" not in self._running.graph.outputs:
            raise InputError("this bundle gives no token vectors; convert again with --with-token-embeddings")
        if not isinstance(session, Session):
            raise InputError(f"vectors of tokens are given on the CPU, not with device={self.device!r}")
        tokens: Float32Array = session.run([input_ids], output="last_hidden_state")[0, : len(input_ids)]
        return tokens

    def finish(
        self, embeddings: Float32Array, *, normalize_embeddings: bool = False, truncate_dim: int | None = None
    ) -> Float32Array:
        """Truncate and normalise the vectors of `embed` as `encode` does.

        Raises:
            InputError: ``truncate_dim`` is out of range.
        """
        finished: Float32Array = finish(
            embeddings, self.manifest, normalize_embeddings=normalize_embeddings, truncate_dim=truncate_dim
        )
        return finished

    @property
    def max_seq_length(self) -> int:
        """The longest input in tokens, special tokens included."""
        return self._tokenizer.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        limit = self.manifest.model.max_seq_length
        self._tokenizer.max_seq_length = check_integer("max_seq_length", value, 3, limit)

    @property
    def device(self) -> str:
        """What runs the batches now: ``cpu``, ``cuda`` or ``tensorrt``."""
        return self._running.device

    @property
    def batches_at_once(self) -> int:
        """How many batches are best under way at once, each in a thread of its own."""
        return self._running.session.threads

    @property
    def max_batch_tokens(self) -> int:
        """How large a batch is best at most: tokens, each text widened to its width."""
        return self._running.session.max_batch_tokens

    @property
    def max_shared_batch_tokens(self) -> int:
        """How large a batch that callers share and wait for is best at most: tokens, each text widened to its width."""
        return self._running.session.max_shared_batch_tokens

    @property
    def mixes_widths(self) -> bool:
        """Whether texts of several attention widths share a batch; on the CPU with the same vectors as alone."""
        return self._running.session.mixed

    @property
    def engine_build(self) -> EngineBuild | None:
        """TensorRT's engines that are being built: ``state`` says how far they are, ``wait()`` waits for them."""
        return self._running.engine_build

    @property
    def precision(self) -> str:
        """The precision of the graph that runs."""
        return self._running.graph.precision

    @property
    def space_id(self) -> str:
        """Vectors of encoders with the same id may be compared, whatever their precision."""
        return self.manifest.space_id

    @property
    def prompts(self) -> Mapping[str, str]:
        """The model's prompts by name."""
        return self.manifest.model.prompts

    def get_sentence_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.manifest.model.embedding_dim

    def _run(
        self, session: AnySession, texts: list[str], prompt: str, batch_size: int | None
    ) -> Iterator[tuple[Rows, Float32Array]]:
        """Give the vectors batch by batch, each with its rows; on a GPU the next texts are tokenised meanwhile."""
        truncations, prompt_length = Truncations(self.max_seq_length), self._prompt_length(prompt)
        texts = [prompt + text for text in texts] if prompt else texts
        if len(texts) == 1:
            # As below, without what only several batches need: beside one text that takes noticeable time.
            tokens = self._tokenizer(texts)
            truncations.add(tokens)
            yield np.zeros(1, dtype=np.intp), session.run(tokens.input_ids, prompt_length=prompt_length)
            truncations.warn(stacklevel=4)
            return

        def batches(window: int) -> Iterator[tuple[Rows, list[list[int]]]]:
            windows = [texts[start : start + window] for start in range(0, len(texts), window)]
            several, start = len(windows) > 1, 0
            for tokens in Workers(1).ahead(self._tokenizer, windows) if several else map(self._tokenizer, windows):
                truncations.add(tokens)
                for rows in session.plan(tokens.n_tokens, batch_size, session.threads):
                    yield rows + start, [tokens.input_ids[row] for row in rows]
                start += len(tokens.n_tokens)

        def run(batch: tuple[Rows, list[list[int]]]) -> tuple[Rows, Float32Array]:
            return batch[0], session.run(batch[1], prompt_length=prompt_length)

        planned = batches(session.window or max(1, len(texts)))
        first = list(itertools.islice(planned, 2))
        planned = itertools.chain(first, planned)
        if session.threads > 1 and len(first) > 1:
            with session.side_by_side():
                yield from session.workers.ahead(run, planned)
        else:
            yield from map(run, planned)
        truncations.warn(stacklevel=4)

    def _prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt that is not pooled, [CLS] included and the closing [SEP] not."""
        if self.manifest.model.include_prompt or not prompt:
            return 0
        return int(self._tokenizer([prompt]).n_tokens[0]) - 1

    def __repr__(self) -> str:
        return f"Encoder({str(self._folder)!r}, precision={self.precision!r}, num_threads={self.num_threads})"

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Encoder, **self._arguments), (self._folder,)
