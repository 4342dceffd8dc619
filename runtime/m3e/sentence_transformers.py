"""Swap the import and keep the program: ``from m3e.sentence_transformers import SentenceTransformer``.

The class has sentence-transformers' methods for inference, with their arguments and defaults, and gives the types that
its programs expect: arrays, or torch tensors where they ask for tensors. torch is imported only then. An ONNX bundle is
not trained, and has no modules or token embeddings to give.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.encoder import Encoder
from m3e.errors import DependencyError, InputError
from m3e.vectors import EmbeddingPrecision, similarity

_IGNORED = {"cache_folder", "token", "use_auth_token", "local_files_only", "trust_remote_code", "model_card_data"}


class SentenceTransformer:
    """An `m3e.Encoder` with the interface of ``sentence_transformers.SentenceTransformer``.

    Args:
        model_name_or_path: What `Encoder` opens.
        device: ``cpu``; None for the same.
        prompts: Prompts by name, instead of the bundle's.
        default_prompt_name: The prompt to use when a call names none.
        similarity_fn_name: ``cosine``, ``dot``, ``euclidean`` or ``manhattan``; None for the bundle's.
        truncate_dim: Keep the first dimensions of every vector.
        backend: Any of sentence-transformers'; the bundle decides what runs.
        revision: None. Which weights they are was decided when the bundle was made.
        model_kwargs: ``{"file_name": "model.onnx"}`` takes the FP32 graph; without it, the fastest.
        **arguments: Those that only matter for a download are accepted and ignored.

    Raises:
        InputError: An argument that this class does not have.
        BundleError: There is no bundle.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        device: str | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: str | None = None,
        truncate_dim: int | None = None,
        backend: str = "onnx",
        revision: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        unknown = sorted(name for name in arguments.keys() - _IGNORED if arguments[name] is not None)
        if revision is not None:
            unknown.append("revision")
        model_kwargs = dict(model_kwargs or {})
        file_name = model_kwargs.pop("file_name", None)
        unknown += [f"model_kwargs[{name!r}]" for name in model_kwargs]
        if unknown:
            raise InputError(f"a bundle is already converted, so {', '.join(unknown)} cannot be used here")
        if backend not in ("torch", "onnx", "openvino"):
            raise InputError(f"backend is {backend!r}, expected torch, onnx or openvino")
        graph = "auto" if file_name is None else file_name if "/" in file_name else f"onnx/{file_name}"
        self.encoder = Encoder(model_name_or_path, device=str(device or "cpu"), precision=graph)
        self.prompts = dict(self.encoder.prompts if prompts is None else prompts)
        model = self.encoder.manifest.model
        self.default_prompt_name = model.default_prompt_name if default_prompt_name is None else default_prompt_name
        if self.default_prompt_name is not None:
            self._prompt(self.default_prompt_name)
        self.similarity_fn_name = str(
            getattr(similarity_fn_name, "value", similarity_fn_name or model.similarity_fn_name)
        )
        self.truncate_dim = truncate_dim
        self.backend = backend

    def encode(
        self,
        sentences: str | Sequence[str] | npt.NDArray[np.str_] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = 32,
        show_progress_bar: bool | None = None,
        output_value: str = "sentence_embedding",
        precision: EmbeddingPrecision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | list[str] | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: Any = None,
        chunk_size: int | None = None,
        *,
        inputs: str | Sequence[str] | npt.NDArray[np.str_] | None = None,
    ) -> Any:
        """Embed texts as sentence-transformers does.

        Args:
            sentences: A text, or several.
            prompt_name: Put the prompt of this name before every text.
            prompt: Put this before every text.
            batch_size: Accepted; batches are made by tokens, and a text's vector does not depend on its batch.
            show_progress_bar: True or False; None shows it on a terminal.
            output_value: ``sentence_embedding``.
            precision: ``float32``, or a quantised type. With ``int8`` and ``uint8`` the ranges are the bundle's, so a
                text gives the same numbers in every call.
            convert_to_numpy: An array; False and no tensor asked for: a list of tensors.
            convert_to_tensor: A torch tensor.
            device: ``cpu``, or None.
            normalize_embeddings: Scale vectors to unit length.
            truncate_dim: Keep the first dimensions; None for the model's own setting.
            pool: What `start_multi_process_pool` gave; all cores are used in either case.
            chunk_size: Accepted with ``pool``.
            inputs: The name of ``sentences`` since version 6.

        Returns:
            float32 (n, dim), (dim,) for a single text; as an array, a tensor or a list of tensors.

        Raises:
            InputError: A text or an argument cannot be used.
        """
        sentences = inputs if sentences is None else sentences
        if sentences is None:
            raise InputError("sentences is None, expected a str or a list of str")
        if device not in (None, "cpu", ["cpu"]) and str(device) != "cpu":
            raise InputError(f"device is {device!r}, expected 'cpu'")
        if prompt is None:
            name = self.default_prompt_name if prompt_name is None else prompt_name
            prompt = "" if name is None else self._prompt(name)
        truncate_dim = self.truncate_dim if truncate_dim is None else truncate_dim
        vectors = self.encoder.encode(
            sentences, prompt=prompt, show_progress_bar=show_progress_bar, output_value=output_value,
            precision=precision, normalize_embeddings=normalize_embeddings, truncate_dim=truncate_dim,
        )  # fmt: skip
        if convert_to_tensor:
            return _torch().from_numpy(np.ascontiguousarray(vectors))
        if convert_to_numpy:
            return vectors
        tensors = _torch().from_numpy(np.ascontiguousarray(vectors))
        return tensors if isinstance(sentences, str) else list(tensors)

    def encode_query(self, sentences: Any, **arguments: Any) -> Any:
        """Embed queries: `encode` with the prompt named ``query``, if there is one."""
        return self.encode(sentences, **self._with_prompt(("query",), arguments))

    def encode_document(self, sentences: Any, **arguments: Any) -> Any:
        """Embed documents: `encode` with the prompt named ``document``, ``passage`` or ``corpus``, if there is one."""
        return self.encode(sentences, **self._with_prompt(("document", "passage", "corpus"), arguments))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Compare every vector of one with every one of the other: (n, m); a tensor where torch is installed."""
        return _tensor_if_possible(similarity(_array(embeddings1), _array(embeddings2), self.similarity_fn_name))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Compare vectors one to one: (n,); a tensor where torch is installed.

        Raises:
            InputError: Not as many on one side as on the other.
        """
        left, right = np.atleast_2d(_array(embeddings1)), np.atleast_2d(_array(embeddings2))
        if left.shape != right.shape:
            raise InputError(f"pairs need equal shapes, received {left.shape} and {right.shape}")
        scores = [similarity(a, b, self.similarity_fn_name)[0, 0] for a, b in zip(left, right, strict=True)]
        return _tensor_if_possible(np.array(scores, dtype=np.float32))

    def tokenize(self, texts: Sequence[str]) -> Any:
        """Give ``input_ids`` and ``attention_mask``; tensors where torch is installed."""
        return {name: _tensor_if_possible(array) for name, array in self.encoder.tokenize(texts).items()}

    def get_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.truncate_dim or self.encoder.get_sentence_embedding_dimension()

    get_sentence_embedding_dimension = get_embedding_dimension

    def get_max_seq_length(self) -> int:
        """The longest input in tokens."""
        return self.max_seq_length

    @property
    def max_seq_length(self) -> int:
        """The longest input in tokens, special tokens included; it can be set to less."""
        return self.encoder.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.encoder.max_seq_length = value

    @property
    def device(self) -> Any:
        """``cpu``: a torch device where torch is installed."""
        with contextlib.suppress(DependencyError):
            return _torch().device("cpu")
        return "cpu"

    @contextlib.contextmanager
    def truncate_sentence_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """Keep fewer dimensions inside a ``with`` block."""
        before, self.truncate_dim = self.truncate_dim, truncate_dim
        try:
            yield
        finally:
            self.truncate_dim = before

    truncate_embeddings = truncate_sentence_embeddings

    def start_multi_process_pool(self, target_devices: list[str] | None = None) -> dict[str, Any]:
        """Nothing needs to start: `encode` uses every core of this machine already."""
        if any(device != "cpu" for device in target_devices or []):
            raise InputError(f"target_devices is {target_devices!r}, expected only 'cpu'")
        return {"input": None, "output": None, "processes": []}

    @staticmethod
    def stop_multi_process_pool(pool: dict[str, Any]) -> None:
        """Nothing was started."""

    def encode_multi_process(self, sentences: Sequence[str], pool: dict[str, Any], **arguments: Any) -> Any:
        """`encode`, which uses every core."""
        return self.encode(sentences, pool=pool, **arguments)

    def eval(self) -> SentenceTransformer:
        """Do nothing: a graph is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> SentenceTransformer:
        """Do nothing for False, as `eval`.

        Raises:
            InputError: A graph cannot be trained.
        """
        if mode:
            raise InputError("an ONNX bundle cannot be trained; train the checkpoint, then convert it")
        return self

    def cpu(self) -> SentenceTransformer:
        """Stay on the CPU."""
        return self

    def to(self, device: Any) -> SentenceTransformer:
        """Stay on the CPU.

        Raises:
            InputError: Another device.
        """
        if str(device) != "cpu":
            raise InputError(f"device is {device!r}, expected 'cpu'")
        return self

    def _prompt(self, name: str) -> str:
        if name not in self.prompts:
            available = ", ".join(map(repr, self.prompts)) or "none"
            raise InputError(f"there is no prompt named {name!r}; the model has {available}")
        return self.prompts[name]

    def _with_prompt(self, names: tuple[str, ...], arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments.get("prompt") is None and arguments.get("prompt_name") is None:
            return {**arguments, "prompt_name": next((name for name in names if name in self.prompts), None)}
        return arguments


def _array(vectors: Any) -> npt.NDArray[Any]:
    """Arrays, tensors, and lists of either."""
    if isinstance(vectors, (list, tuple)):
        return np.stack([np.asarray(vector) for vector in vectors])
    return np.asarray(vectors)


def _tensor_if_possible(array: npt.NDArray[Any]) -> Any:
    with contextlib.suppress(DependencyError):
        return _torch().from_numpy(array)
    return array


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise DependencyError("tensors were asked for and torch is not installed: pip install torch") from error
    return torch
