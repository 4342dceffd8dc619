"""Checkpoint -> bundle: fetch, load, build, describe, certify, publish."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import tokenizers

from m3e import manifest as manifest_format
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
from m3e.session import Session
from m3e.tokenizer import Tokenizer
from m3e.vectors import normalize as unit_rows
from m3e_export.calibrate import Int8Site
from m3e_export.certify import certify
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.emulate import emulated_session
from m3e_export.fp16 import choose_fp32_sites
from m3e_export.graph import build_graph
from m3e_export.graph_cuda import build_cuda_graph
from m3e_export.graph_tensorrt import build_tensorrt_graph, build_watched
from m3e_export.int8 import Int8Weights
from m3e_export.publish import check_target, staged
from m3e_export.quantize import calibration_ids, quantize
from m3e_export.sources import fetch_checkpoint
from m3e_export.texts import GOLDEN_TEXTS, range_texts

PRECISIONS = ("fp32", "int8", "fp16")
TARGETS = ("cpu", "cuda", "tensorrt")
# The graphs there are, by precision and target. The FP32 graph of the CPU runs on CUDA too.
FILES = {
    ("fp32", "cpu"): "onnx/model.onnx",
    ("int8", "cpu"): "onnx/model_int8.onnx",
    ("fp16", "cuda"): "onnx/model_fp16.onnx",
    ("fp16", "tensorrt"): "onnx/model_fp16_plain.onnx",
    ("int8", "tensorrt"): "onnx/model_int8_plain.onnx",
}
# Another processor adds the same products in another order; far below this, far above that. On a GPU every store is
# rounded to FP16, and a sum that falls on the other side of a rounding moves an INT8 level.
_CANARY_TOLERANCE = {
    ("fp32", "cpu"): 1e-5, ("int8", "cpu"): 2e-3,
    ("fp16", "cuda"): 2e-3, ("fp16", "tensorrt"): 2e-3, ("int8", "tensorrt"): 1e-2,
}  # fmt: skip
# Tokens that are run to find what FP16 cannot hold; the extremes come from the model's own outlier channels, in
# every text.
_FP16_TOKENS = 4000
_EMULATED_BATCH_TOKENS = 2048
# Files for the other tools that read this layout; copied as they are.
_COPIED = (
    "config.json",
    "config_sentence_transformers.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def convert(
    checkpoint: str,
    target: Path,
    *,
    precisions: Sequence[str] = ("fp32",),
    targets: Sequence[str] = ("cpu",),
    max_seq_length: int | None = None,
    normalize: bool | None = None,
    with_token_embeddings: bool = False,
    revision: str | None = None,
    force: bool = False,
    calibration: Path | None = None,
    accept_accuracy: bool = False,
    report: Callable[[str], None] = lambda step: None,
) -> Manifest:
    """Convert a checkpoint into a bundle.

    Args:
        checkpoint: A folder or a hub id.
        target: Where the bundle will be; it appears there whole or not at all.
        precisions: Of ``PRECISIONS``.
        targets: Of ``TARGETS``; each pair of the two that is in ``FILES`` is built.
        max_seq_length: Longest input in tokens; None for the checkpoint's own.
        normalize: Unit length inside the graph; None for the checkpoint's own.
        with_token_embeddings: Also output ``last_hidden_state``.
        revision: Branch, tag or commit on the hub.
        force: Replace a bundle that is there already.
        calibration: UTF-8 file with a text a line to calibrate int8 on; None for the corpus that comes along.
        accept_accuracy: Publish an int8 graph that is beyond its tolerance, and record that.
        report: Called with a line of text at each step.

    Returns:
        The manifest of the bundle, certificates included.

    Raises:
        ExportError: The checkpoint, the target or the result is not as it must be; nothing was published.
        DependencyError: A package is missing.
    """
    pairs = check_pairs(precisions, targets)
    check_target(target, force)
    report(f"reading {checkpoint}")
    loaded = load_checkpoint(fetch_checkpoint(checkpoint, revision), max_seq_length=max_seq_length, normalize=normalize)
    weights_bytes = sum(tensor.nbytes for tensor in loaded.tensors.values())
    # An int8 graph has a quarter of the bytes, or more where layers stay FP32.
    share = {"fp32": 1.1, "int8": 0.6, "fp16": 0.7}
    needed_bytes = int(sum(share[precision] for precision, _ in pairs) * weights_bytes) + (8 << 20)
    with staged(target, needed_bytes) as folder:
        _write_layout(loaded, folder)
        int8_sites: dict[str, Int8Site] = {}
        texts = None if calibration is None else _read_texts(calibration)
        if "int8" in precisions:
            int8_sites = quantize(loaded, texts, report=report)
        fp32_sites = _fp32_sites(loaded, texts, report) if {"cuda", "tensorrt"} & set(targets) else ()
        graphs = []
        for pair in pairs:
            report(f"building the {pair[0]} graph for {pair[1]}")
            sites = int8_sites if pair[0] == "int8" else {}
            graphs.append(_write_graph(loaded, folder, pair, sites, fp32_sites, with_token_embeddings))
        manifest = _describe(loaded, folder, graphs)
        _write(folder / MANIFEST_NAME, manifest.to_bytes())
        manifest = _certify(manifest, loaded, folder, accept_accuracy, report)
        _write(folder / MANIFEST_NAME, manifest.to_bytes())
        if "cpu" in targets:
            Encoder(folder)  # the last look is the user's first
        report(f"publishing {target}")
    return manifest


def check_pairs(precisions: Sequence[str], targets: Sequence[str]) -> list[tuple[str, str]]:
    """Pair precisions with targets.

    Returns:
        The pairs that there are graphs for, in the order in which they were asked for.

    Raises:
        ExportError: A precision or a target that is left without a graph.
    """
    pairs = [
        (precision, target)
        for target in dict.fromkeys(targets)
        for precision in dict.fromkeys(precisions)
        if (precision, target) in FILES
    ]
    known = ", ".join(f"{precision} for {target}" for precision, target in FILES)
    for kind, asked, place in (("precision", precisions, 0), ("target", targets, 1)):
        for name in asked:
            if name not in {pair[place] for pair in pairs}:
                raise ExportError(f"{kind} {name} is left without a graph; there are {known}")
    return pairs


def _fp32_sites(checkpoint: Checkpoint, texts: Sequence[str] | None, report: Callable[[str], None]) -> tuple[str, ...]:
    """Find what FP16 cannot hold."""
    input_ids = calibration_ids(checkpoint, texts)
    counts = np.cumsum([len(ids) for ids in input_ids])
    report("looking for values beyond FP16")
    outside = choose_fp32_sites(checkpoint, input_ids[: int(np.searchsorted(counts, _FP16_TOKENS)) + 1], build_watched)
    for site, value in outside.items():
        report(f"{site} stays FP32: its values reach {value:.3g}")
    return tuple(outside)


def _write_layout(checkpoint: Checkpoint, folder: Path) -> None:
    """Write sentence-transformers' layout around the graphs, so that other tools find what they look for."""
    for name in _COPIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    _write(folder / "tokenizer.json", checkpoint.tokenizer_json)
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * checkpoint.normalize
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": checkpoint.max_seq_length, "do_lower_case": False}
    )
    pooling = {"embedding_dimension": checkpoint.config.hidden_size, "pooling_mode": list(checkpoint.pooling)}
    _write_json(folder / "1_Pooling" / "config.json", pooling)


def _write_graph(
    checkpoint: Checkpoint,
    folder: Path,
    pair: tuple[str, str],
    int8_sites: Mapping[str, Int8Site],
    fp32_sites: Sequence[str],
    with_token_embeddings: bool,
) -> Graph:
    precision, target = pair
    if target == "cuda":
        model = build_cuda_graph(checkpoint, fp32_sites)
    elif target == "tensorrt":
        model = build_tensorrt_graph(checkpoint, fp32_sites, int8_sites or None)
    else:
        weights = Int8Weights(checkpoint, int8_sites) if precision == "int8" else None
        model = build_graph(checkpoint, weights, with_token_embeddings=with_token_embeddings)
    data = model.SerializeToString(deterministic=True)
    file = FILES[pair]
    _write(folder / file, data)
    session = emulated_session(data, target) if target != "cpu" else Session(data, num_threads=1)
    tokens = Tokenizer(checkpoint.tokenizer_json, checkpoint.max_seq_length)(GOLDEN_TEXTS)
    golden = np.concatenate([session.run([ids]) for ids in tokens.input_ids])
    return Graph(
        file=file,
        precision=precision,
        target=target,
        opset=model.opset_import[0].version,
        ir_version=model.ir_version,
        ops=_op_types(model),
        outputs=tuple(output.name for output in model.graph.output),
        # A GPU's library chooses its kernels by the size of the batch.
        batch_invariant=target == "cpu",
        cpu_features=("vnni",) if pair == ("int8", "cpu") else (),
        int8_sites={
            name: manifest_format.Int8Site(alpha=site.alpha, relative_error=site.relative_error)
            for name, site in int8_sites.items()
            if target == "cpu" or name not in fp32_sites
        },
        fp32_sites=tuple(fp32_sites) if target != "cpu" else (),
        certificate=None,
        golden_embeddings=encode_array(golden),
        canary_tolerance=_CANARY_TOLERANCE[pair],
    )


def _describe(checkpoint: Checkpoint, folder: Path, graphs: Sequence[Graph]) -> Manifest:
    config = checkpoint.config
    tokens = Tokenizer(checkpoint.tokenizer_json, checkpoint.max_seq_length)(GOLDEN_TEXTS)
    files = {
        path.relative_to(folder).as_posix(): _fingerprint(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    zeros = encode_array(np.zeros((2, config.hidden_size), dtype=np.float32))
    return Manifest(
        format_version=FORMAT_VERSION,
        created_with={module.__name__: str(module.__version__) for module in (onnx, onnxruntime, tokenizers, np)},
        model=Model(
            architecture="bert",
            embedding_dim=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_seq_length=checkpoint.max_seq_length,
            pooling=checkpoint.pooling,
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
    manifest: Manifest, checkpoint: Checkpoint, folder: Path, accept_accuracy: bool, report: Callable[[str], None]
) -> Manifest:
    """Compare each graph with the reference, and measure the ranges of the first one's vectors."""
    graphs = []
    ranges: tuple[str, str] | None = None
    for graph in manifest.graphs:
        report(f"certifying {graph.precision} for {graph.target}")
        encode = _encode_function(folder, graph, checkpoint)
        certificate = certify(encode, graph.precision, checkpoint, accept_accuracy=accept_accuracy)
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


def _encode_function(
    folder: Path, graph: Graph, checkpoint: Checkpoint
) -> Callable[[Sequence[str]], npt.NDArray[np.float32]]:
    """Embed texts as a user will: through the runtime, or a GPU's graph through its emulation."""
    if graph.target == "cpu":
        encoder = Encoder(folder, precision=graph.precision)
        # As the reference: without the model's default prompt.
        return lambda texts: encoder.encode(texts, prompt="")
    session = emulated_session((folder / graph.file).read_bytes(), graph.target)
    tokenizer = Tokenizer(checkpoint.tokenizer_json, checkpoint.max_seq_length)

    def encode(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        tokens = tokenizer(texts)
        vectors = np.empty((len(texts), checkpoint.config.hidden_size), dtype=np.float32)
        for rows in plan_sorted(tokens.n_tokens, _EMULATED_BATCH_TOKENS):
            vectors[rows] = session.run([tokens.input_ids[row] for row in rows])
        return vectors

    return encode


def _ranges(embeddings: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> str:
    """Mean plus and minus four standard deviations of each dimension: 256 steps over it cost a cosine of 2e-5."""
    mean, spread = embeddings.mean(axis=0), 4 * embeddings.std(axis=0)
    return encode_array(np.stack([mean - spread, mean + spread]))


def _space_id(checkpoint: Checkpoint) -> str:
    """Hash what decides whether vectors may be compared: weights, tokenizer, pooling, normalisation."""
    decides = [checkpoint.weights_sha256, hashlib.sha256(checkpoint.tokenizer_json).hexdigest(),
               *checkpoint.pooling, str(checkpoint.normalize)]  # fmt: skip
    return hashlib.sha256("\n".join(decides).encode()).hexdigest()[:16]


def _op_types(model: onnx.ModelProto) -> tuple[str, ...]:
    return tuple(
        sorted({f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node})
    )


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


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def _write_json(path: Path, content: object) -> None:
    _write(path, (json.dumps(content, indent=2) + "\n").encode())
