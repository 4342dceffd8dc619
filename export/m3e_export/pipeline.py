"""Checkpoint -> bundle: fetch, load, build, describe, certify, publish."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import tokenizers

from m3e.bundle import Bundle
from m3e.encoder import Encoder, TruncationWarning
from m3e.errors import ExportError
from m3e.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    File,
    Golden,
    Graph,
    Manifest,
    Model,
    Source,
    encode_array,
)
from m3e.plan import plan_sorted
from m3e.session import import_onnxruntime
from m3e.tokenizer import Tokenizer
from m3e.vectors import normalize as unit_rows
from m3e_export import optimum_frontend
from m3e_export.certify import certify, references
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.emulate import emulated_session
from m3e_export.evaluate import Encode, Pair, read_pairs
from m3e_export.fit import Int8Site
from m3e_export.fp16 import choose_fp32_sites
from m3e_export.graph_tensorrt import build_watched
from m3e_export.graphs import build_model, check_kind, choose_kinds, write_graph
from m3e_export.layout import write, write_layout
from m3e_export.modules import Normalize, encoder_folder
from m3e_export.publish import check_target, staged
from m3e_export.quantize import calibration_ids, quantize
from m3e_export.reference import reference_name
from m3e_export.sources import LocalCheckpoint, fetch_checkpoint
from m3e_export.texts import GOLDEN_TEXTS, range_texts
from m3e_export.traced_fp16 import choose_fp32_nodes
from m3e_export.traced_int8 import quantize_traced

# Bytes of a graph for each byte of the FP32 weights: int8 has a quarter of them, or more where layers stay FP32.
_SHARE = {"fp32": 1.1, "int8": 0.6, "fp16": 0.7}
# Tokens that are run to find what FP16 cannot hold; the extremes come from the model's own outlier channels, in every
# text.
_FP16_TOKENS = 4000
_EMULATED_BATCH_TOKENS = 2048


def convert(
    checkpoint: str | LocalCheckpoint,
    target: Path,
    *,
    precisions: Sequence[str] = ("fp32",),
    targets: Sequence[str] = ("cpu",),
    frontend: str = "builder",
    max_seq_length: int | None = None,
    normalize: bool | None = None,
    with_token_embeddings: bool = False,
    revision: str | None = None,
    force: bool = False,
    cpus: Sequence[str] | None = None,
    calibration: Path | None = None,
    evaluation: Path | None = None,
    accept_accuracy: bool = False,
    report: Callable[[str], None] = lambda step: None,
) -> Manifest:
    """Convert a checkpoint into a bundle.

    Args:
        checkpoint: A folder or a hub id, or one that was fetched already.
        target: Where the bundle will be; it appears there whole or not at all.
        precisions: ``fp32``, ``int8``, ``fp16``.
        targets: ``cpu``, ``cuda``, ``tensorrt``; each pair of the two that there is a graph for is built.
        frontend: ``builder`` writes the graphs of the encoders that it knows from their weights; ``optimum`` traces any
            other.
        max_seq_length: Longest input in tokens; None for the checkpoint's own.
        normalize: Unit length inside the graph; None for the checkpoint's own.
        with_token_embeddings: Also output ``last_hidden_state``.
        revision: Branch, tag or commit on the hub.
        force: Replace a bundle that is there already.
        cpus: Processors, ``vnni`` and ``avx2``, to make int8 graphs for; None for one like this.
        calibration: UTF-8 file with a text a line to calibrate int8 on; None for the corpus that comes along.
        evaluation: UTF-8 file of labelled pairs, ``sentence1<TAB>sentence2<TAB>label``; their figures join the
            certificates.
        accept_accuracy: Publish an int8 or fp16 graph that is beyond its tolerance, and record that.
        report: Called with a line of text at each step.

    Returns:
        The manifest of the bundle, certificates included.

    Raises:
        ExportError: The checkpoint, the target or the result is not as it must be; nothing was published.
        DependencyError: A package is missing.
    """
    traced = frontend == "optimum"
    kinds = choose_kinds(precisions, targets, cpus, traced=traced)
    check_target(target, force)
    texts = None if calibration is None else _read_texts(calibration)
    pairs = [] if evaluation is None else read_pairs(evaluation)
    report(f"reading {checkpoint if isinstance(checkpoint, str) else checkpoint.id}")
    source = fetch_checkpoint(checkpoint, revision) if isinstance(checkpoint, str) else checkpoint
    config = optimum_frontend.read_config(encoder_folder(source.folder)) if traced else None
    loaded = load_checkpoint(source, max_seq_length=max_seq_length, normalize=normalize, config=config)
    for kind in kinds:
        check_kind(loaded, kind)
    if traced:
        report("tracing the encoder")
    encoder = optimum_frontend.trace_encoder(loaded) if traced else None
    weights_bytes = sum(tensor.nbytes for tensor in loaded.tensors.values())
    needed_bytes = int(sum(_SHARE[kind.precision] for kind in kinds) * weights_bytes) + (8 << 20)
    with staged(target, needed_bytes) as folder:
        write_layout(loaded, folder)
        on_gpu = any(kind.target != "cpu" for kind in kinds)
        fp32_sites = _fp32_sites(loaded, encoder, texts, report) if on_gpu else ()
        sites_by_level: dict[int, dict[str, Int8Site]] = {}
        graphs = []
        for kind in kinds:
            if kind.precision == "int8" and kind.max_level not in sites_by_level:
                sites_by_level[kind.max_level] = _int8_sites(loaded, encoder, texts, kind.max_level, report)
            int8_sites = sites_by_level[kind.max_level] if kind.precision == "int8" else None
            report(f"building the {kind.precision} graph for {kind.cpu or kind.target}")
            model = build_model(
                loaded, encoder, kind, int8_sites, fp32_sites, with_token_embeddings=with_token_embeddings
            )
            graph = write_graph(loaded, folder, kind, model, int8_sites=int8_sites or {}, fp32_sites=fp32_sites)
            graphs.append(dataclasses.replace(graph, batch_invariant=graph.batch_invariant and not traced))
        manifest = _describe(loaded, folder, graphs)
        write(folder / MANIFEST_NAME, manifest.to_bytes())
        manifest = _certify(manifest, loaded, folder, pairs, accept_accuracy, report)
        write(folder / MANIFEST_NAME, manifest.to_bytes())
        for graph in graphs:  # the last look is the user's first
            if graph.target == "cpu":
                Encoder(folder, precision=graph.file)
            else:
                Bundle(folder).read_graph(graph)
        report(f"publishing {target}")
    return manifest


def _int8_sites(
    checkpoint: Checkpoint,
    encoder: onnx.ModelProto | None,
    texts: Sequence[str] | None,
    max_level: int,
    report: Callable[[str], None],
) -> dict[str, Int8Site]:
    if encoder is None:
        return quantize(checkpoint, texts, max_level=max_level, report=report)
    exact = optimum_frontend.build_traced_graph(encoder, checkpoint)
    return quantize_traced(exact, calibration_ids(checkpoint, texts), max_level=max_level, report=report)


def _fp32_sites(
    checkpoint: Checkpoint,
    encoder: onnx.ModelProto | None,
    texts: Sequence[str] | None,
    report: Callable[[str], None],
) -> tuple[str, ...]:
    """Find what FP16 cannot hold of a checkpoint, or of its traced encoder."""
    input_ids = calibration_ids(checkpoint, texts)
    counts = np.cumsum([len(ids) for ids in input_ids])
    report("looking for values beyond FP16")
    some = input_ids[: int(np.searchsorted(counts, _FP16_TOKENS)) + 1]
    outside = (
        choose_fp32_sites(checkpoint, some, build_watched) if encoder is None else choose_fp32_nodes(encoder, some)
    )
    for site, value in outside.items():
        report(f"{site} stays FP32: its values reach {value:.3g}")
    return tuple(outside)


def _describe(checkpoint: Checkpoint, folder: Path, graphs: Sequence[Graph]) -> Manifest:
    config = checkpoint.config
    tokens = Tokenizer(checkpoint.tokenizer_json, checkpoint.max_seq_length)(GOLDEN_TEXTS)
    files = {
        path.relative_to(folder).as_posix(): _fingerprint(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    zeros = encode_array(np.zeros((2, checkpoint.embedding_dim), dtype=np.float32))
    return Manifest(
        format_version=FORMAT_VERSION,
        created_with={
            module.__name__: str(module.__version__) for module in (onnx, import_onnxruntime(), tokenizers, np)
        },
        model=Model(
            architecture=config.architecture,
            embedding_dim=checkpoint.embedding_dim,
            num_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_seq_length=checkpoint.max_seq_length,
            pooling=checkpoint.pooling,
            include_prompt=checkpoint.include_prompt,
            normalize=checkpoint.normalize,
            prompts=checkpoint.prompts,
            default_prompt_name=checkpoint.default_prompt_name,
            similarity_fn_name=checkpoint.similarity_fn_name,
        ),
        source=Source(id=checkpoint.id, revision=checkpoint.revision, weights_sha256=checkpoint.weights_sha256),
        space_id=_space_id(checkpoint),
        graphs=tuple(graphs),
        golden=tuple(
            Golden(text=text, input_ids=tuple(ids)) for text, ids in zip(GOLDEN_TEXTS, tokens.input_ids, strict=True)
        ),
        embedding_ranges=zeros,
        unit_embedding_ranges=zeros,
        files=files,
    )


def _certify(
    manifest: Manifest,
    checkpoint: Checkpoint,
    folder: Path,
    pairs: Sequence[Pair],
    accept_accuracy: bool,
    report: Callable[[str], None],
) -> Manifest:
    """Compare each graph with the reference, and measure the ranges of the first one's vectors."""
    report(f"embedding the certificate's texts with {reference_name()}")
    reference = references(checkpoint, pairs)
    graphs = []
    ranges: tuple[str, str] | None = None
    for graph in manifest.graphs:
        report(f"certifying {graph.file}")
        encode = _encode_function(folder, graph, checkpoint)
        certificate = certify(encode, graph, reference, accept_accuracy=accept_accuracy)
        graphs.append(dataclasses.replace(graph, certificate=certificate))
        if ranges is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TruncationWarning)  # a short max_seq_length is meant
                vectors = encode(range_texts())
            ranges = _ranges(vectors), _ranges(unit_rows(vectors))
    assert ranges is not None
    return dataclasses.replace(
        manifest, graphs=tuple(graphs), embedding_ranges=ranges[0], unit_embedding_ranges=ranges[1]
    )


def _encode_function(folder: Path, graph: Graph, checkpoint: Checkpoint) -> Encode:
    """Embed texts as a user will, through the runtime, or a GPU's graph through its emulation.

    As the reference: without the model's default prompt.
    """
    if graph.target == "cpu":
        encoder = Encoder(folder, precision=graph.file)
        return lambda texts: encoder.encode(texts, prompt="")
    session = emulated_session((folder / graph.file).read_bytes())
    tokenizer = Tokenizer(checkpoint.tokenizer_json, checkpoint.max_seq_length)

    def encode(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        tokens = tokenizer(texts)
        vectors = np.empty((len(texts), checkpoint.embedding_dim), dtype=np.float32)
        for rows in plan_sorted(tokens.n_tokens, _EMULATED_BATCH_TOKENS):
            vectors[rows] = session.run([tokens.input_ids[row] for row in rows])
        return vectors

    return encode


def _ranges(embeddings: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> str:
    """Mean plus and minus four standard deviations of each dimension: 256 steps over it cost a cosine of 2e-5."""
    mean, spread = embeddings.mean(axis=0), 4 * embeddings.std(axis=0)
    return encode_array(np.stack([mean - spread, mean + spread]))


def _space_id(checkpoint: Checkpoint) -> str:
    """Hash what decides whether vectors may be compared: weights, tokenizer, pooling and what follows it."""
    head = ["normalize" if isinstance(module, Normalize) else module.fingerprint() for module in checkpoint.head]
    decides = [checkpoint.weights_sha256, hashlib.sha256(checkpoint.tokenizer_json).hexdigest(),
               *checkpoint.pooling, str(checkpoint.include_prompt), *head]  # fmt: skip
    return hashlib.sha256("\n".join(decides).encode()).hexdigest()[:16]


def _fingerprint(path: Path) -> File:
    with path.open("rb") as file:
        return File(size_bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _read_texts(path: Path) -> list[str]:
    try:
        texts = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise ExportError(f"the calibration file {str(path)!r} cannot be read as UTF-8 text: {error}") from error
    if len(texts) < 100:
        raise ExportError(f"the calibration file {str(path)!r} has {len(texts)} texts, expected at least 100 lines")
    return texts
