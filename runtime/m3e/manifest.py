"""The manifest: what a bundle says of itself, and the contract between the exporter and the runtime.

``FORMAT_VERSION`` rises when a reader of the old version would misread a new manifest: a field removed, a
meaning changed, or a field added that decides vectors. A reader refuses every version but its own.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import types
import typing
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.errors import BundleError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

# [CLS], a token and [SEP]: what the exporter asks of a checkpoint too.
FEWEST_TOKENS = 3
# Of any size of a model; the largest vocabularies have 2^20 tokens.
_LARGEST_SIZE = 1 << 24
# The most that the exporter allows a graph (`m3e_export.graphs.KINDS`). No two unit vectors differ by more than 2 in a
# dimension: with such a bound the golden texts would check nothing.
_LARGEST_CANARY_TOLERANCE = 1e-2

Float32Array = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The facts about the model that the runtime needs; a name is not among them."""

    architecture: str
    embedding_dim: int
    num_layers: int
    num_attention_heads: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_seq_length: int
    pooling: tuple[str, ...]
    include_prompt: bool
    normalize: bool
    prompts: dict[str, str]
    default_prompt_name: str | None
    similarity_fn_name: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the weights came from: folder name or hub id, revision, hash of the weight file."""

    id: str
    revision: str | None
    weights_sha256: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A graph on the user's labelled pairs: Spearman's correlation of cosine and label, its reference's beside it.

    ``top10_overlap`` is the mean share of a text's ten nearest neighbours, among all texts of the pairs, that the graph
    and its reference agree on.
    """

    n_pairs: int
    n_texts: int
    reference_spearman: float
    spearman: float
    top10_overlap: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """How far a graph, run through the runtime, is from its reference on the certificate's texts.

    Differences are between unit vectors; the norm's difference is relative to the reference's norm. ``p1_cosine`` is
    the first percentile. ``max_batch_difference`` is between a text alone and the same text among others.
    ``tolerance`` bounds both differences of an fp32 graph, and 1 - ``min_cosine`` of the others; ``accepted`` is true
    where a user took a worse graph with ``--accept-accuracy``. ``evaluation`` is there where labelled pairs were given.
    """

    reference: str
    n_texts: int
    min_tokens: int
    max_tokens: int
    mean_cosine: float
    p1_cosine: float
    min_cosine: float
    max_abs_difference: float
    max_norm_difference: float
    max_batch_difference: float
    tolerance: float
    accepted: bool
    evaluation: Evaluation | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Int8Site:
    """How one input of linear layers was quantised: its smoothing, and what rounding adds relative to the output."""

    alpha: float
    relative_error: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One ONNX file: what it computes, what it needs, and its vectors of the golden texts.

    ``golden_embeddings`` is base64 of little-endian float32 (golden texts, embedding_dim);
    ``canary_tolerance`` bounds the largest difference between unit vectors when they are computed again.
    ``cpu_features`` are what a processor needs to compute it right: ``vnni`` for 8-bit products that do not saturate.
    ``int8_sites`` are the quantised inputs by name; linear layers that read none of them are FP32,
    or FP16 in a graph for a GPU. ``fp32_sites`` are the parts of such a graph that stay FP32, because FP16 cannot hold
    their values.
    ``certificate`` is None only while the exporter is at work.
    """

    file: str
    precision: str
    target: str
    opset: int
    ir_version: int
    ops: tuple[str, ...]
    outputs: tuple[str, ...]
    batch_invariant: bool
    cpu_features: tuple[str, ...]
    int8_sites: dict[str, Int8Site]
    fp32_sites: tuple[str, ...]
    certificate: Certificate | None
    golden_embeddings: str
    canary_tolerance: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """A text whose token ids and vectors are known."""

    text: str
    input_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """Size and hash of a file of the bundle."""

    size_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole of ``manifest.json``.

    ``embedding_ranges`` and ``unit_embedding_ranges`` are base64 of little-endian float32 (2, embedding_dim):
    minimum and maximum of each dimension, for int8 output, of the graph's vectors and of the same at unit length.
    Vectors may be compared when their ``space_id`` is equal.
    """

    format_version: int
    created_with: dict[str, str]
    model: Model
    source: Source
    space_id: str
    graphs: tuple[Graph, ...]
    golden: tuple[Golden, ...]
    embedding_ranges: str
    unit_embedding_ranges: str
    files: dict[str, File]

    def to_bytes(self) -> bytes:
        """Serialise to canonical JSON that carries its own hash."""
        content = dataclasses.asdict(self)
        content["manifest_sha256"] = hashlib.sha256(_canonical(content)).hexdigest()
        return _canonical(content)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, and so of every file of the bundle."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest strictly: unknown, missing and mistyped fields are errors, and so is a changed byte.

        So are values that no model has: sizes of nothing or beyond bounds, empty lists, numbers that are not finite.

        Raises:
            BundleError: Every problem found, in one message.
        """
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST_NAME} is not JSON ({error}); convert the checkpoint again") from error
        if not isinstance(content, dict) or "format_version" not in content:
            raise BundleError(f"{MANIFEST_NAME} has no format_version: it was not written by m3e")
        if content["format_version"] != FORMAT_VERSION:
            raise BundleError(
                f"{MANIFEST_NAME} has format version {content['format_version']!r}, this m3e reads {FORMAT_VERSION}; "
                "convert the checkpoint again with this m3e, or install the m3e that wrote it"
            )
        declared = content.pop("manifest_sha256", None)
        if hashlib.sha256(_canonical(content)).hexdigest() != declared:
            raise BundleError(f"{MANIFEST_NAME} does not match its own hash: it was edited or damaged")
        problems: list[str] = []
        manifest = _parse(cls, content, MANIFEST_NAME, problems)
        if not problems:
            problems = _out_of_range(manifest)
        if problems:
            raise BundleError("; ".join(problems))
        assert isinstance(manifest, Manifest)
        if manifest.to_bytes() != data:
            raise BundleError(f"{MANIFEST_NAME} is not in its canonical form: it was edited or damaged")
        return manifest


def encode_array(array: Float32Array) -> str:
    """Base64 of the array's values as little-endian float32, row-major."""
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode("ascii")


def decode_array(text: str, shape: tuple[int, ...]) -> Float32Array:
    """Inverse of `encode_array`; float32 of the given shape.

    Raises:
        BundleError: The text does not hold that many values.
    """
    try:
        array = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").reshape(shape)
    except ValueError as error:
        raise BundleError(f"{MANIFEST_NAME}: expected a base64 float32 array of shape {shape}: {error}") from error
    return array.astype(np.float32)


def _canonical(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode("utf-8", "surrogatepass")


def _parse(expected: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Turn JSON into ``expected`` (a dataclass, builtin, tuple, dict or optional type), collecting what is wrong."""
    origin = typing.get_origin(expected)
    arguments = typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        return _parse_dataclass(typing.cast(type, expected), value, where, problems)
    if origin is types.UnionType:
        return None if value is None else _parse(arguments[0], value, where, problems)
    if origin is tuple and isinstance(value, list):
        return tuple(_parse(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if origin is None and type(value) is expected:
        if expected is float and not math.isfinite(value):
            problems.append(f"{where} is {value}, expected a finite number")
        return value
    name = getattr(origin or expected, "__name__", str(expected))
    problems.append(f"{where} is {type(value).__name__}, expected {name}")
    return None


def _parse_dataclass(expected: type, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{where} is {type(value).__name__}, expected an object")
        return None
    hints = typing.get_type_hints(expected)
    missing, unknown = hints.keys() - value.keys(), value.keys() - hints.keys()
    if missing or unknown:
        problems += [f"{where} has no field {name!r}" for name in sorted(missing)]
        problems += [f"{where} has an unknown field {name!r}" for name in sorted(unknown)]
        return None
    return expected(**{name: _parse(hint, value[name], f"{where}.{name}", problems) for name, hint in hints.items()})


def _out_of_range(manifest: Manifest) -> list[str]:
    """Say which values have the right type and cannot be."""
    sizes = ("embedding_dim", "num_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size",
             "max_seq_length")  # fmt: skip
    problems = []
    for name in sizes:
        value, fewest = getattr(manifest.model, name), FEWEST_TOKENS if name == "max_seq_length" else 1
        if not fewest <= value <= _LARGEST_SIZE:
            problems.append(f"{MANIFEST_NAME}.model.{name} is {value}, expected {fewest} to {_LARGEST_SIZE}")
    lists = {"model.pooling": manifest.model.pooling, "graphs": manifest.graphs, "golden": manifest.golden}
    problems += [
        f"{MANIFEST_NAME}.{name} is empty, expected at least one" for name, items in lists.items() if not items
    ]
    for i, graph in enumerate(manifest.graphs):
        if not 0 < graph.canary_tolerance <= _LARGEST_CANARY_TOLERANCE:
            problems.append(
                f"{MANIFEST_NAME}.graphs[{i}].canary_tolerance is {graph.canary_tolerance}, expected more than 0 and "
                f"at most {_LARGEST_CANARY_TOLERANCE}"
            )
    return problems
