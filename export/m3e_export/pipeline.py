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
from m3e.session import Session
from m3e.tokenizer import Tokenizer
from m3e.vectors import normalize as unit_rows
from m3e_export import optimum_frontend
from m3e_export.calibrate import Int8Site
from m3e_export.certify import certify
from m3e_export.checkpoint import Checkpoint, load_checkpoint, read_json
from m3e_export.graph import build_graph
from m3e_export.int8 import Int8Weights
from m3e_export.pooling import LEGACY_KEYS
from m3e_export.publish import check_target, staged
from m3e_export.quantize import quantize
from m3e_export.sources import LocalCheckpoint, fetch_checkpoint
from m3e_export.texts import GOLDEN_TEXTS, range_texts
from m3e_export.tokenizer import complete_config

PRECISIONS = ("fp32", "int8")
FRONTENDS = ("builder", "optimum")
_FILES = {"fp32": "onnx/model.onnx", "int8": "onnx/model_int8.onnx"}
# Another processor adds the same products in another order; far below this, far above that.
_CANARY_TOLERANCE = {"fp32": 1e-5, "int8": 2e-3}
# Files for the other tools that read this layout; copied as they are.
_COPIED = (
    "config.json",
    "config_sentence_transformers.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def convert(
    checkpoint: str | LocalCheckpoint,
    target: Path,
    *,
    precisions: Sequence[str] = ("fp32",),
    frontend: str = "builder",
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
        checkpoint: A folder or a hub id, or one that was fetched already.
        target: Where the bundle will be; it appears there whole or not at all.
        precisions: Of ``PRECISIONS``.
        frontend: Of ``FRONTENDS``: ``builder`` writes the graph of a BERT from its weights; ``optimum`` traces any
            other encoder, fp32 only.
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
    check_target(target, force)
    source = fetch_checkpoint(checkpoint, revision) if isinstance(checkpoint, str) else checkpoint
    report(f"reading {source.id}")
    traced = frontend == "optimum"
    if traced and "int8" in precisions:
        raise ExportError(
            "--frontend optimum makes fp32 graphs only: our int8 is fitted layer by layer to a known encoder, and "
            "dynamic quantisation, which needs no fitting, makes a text's vector depend on the texts beside it"
        )
    loaded = load_checkpoint(
        source,
        max_seq_length=max_seq_length,
        normalize=normalize,
        config=optimum_frontend.read_config(source.folder) if traced else None,
    )
    weights_bytes = sum(tensor.nbytes for tensor in loaded.tensors.values())
    # An int8 graph has a quarter of the bytes, or more where layers stay FP32.
    share = {"fp32": 1.1, "int8": 0.6}
    needed_bytes = int(sum(share[precision] for precision in precisions) * weights_bytes) + (8 << 20)
    with staged(target, needed_bytes) as folder:
        _write_layout(loaded, folder)
        graphs = []
        for precision in dict.fromkeys(precisions):
            sites = {}
            if precision == "int8":
                texts = None if calibration is None else _read_texts(calibration)
                sites = quantize(loaded, texts, report=report)
            report(f"{'tracing' if traced else 'building'} the {precision} graph")
            if traced:
                model = optimum_frontend.trace_graph(loaded, with_token_embeddings=with_token_embeddings)
            else:
                weights = Int8Weights(loaded, sites) if precision == "int8" else None
                model = build_graph(loaded, weights, with_token_embeddings=with_token_embeddings)
            graphs.append(_write_graph(loaded, folder, model, precision, sites, batch_invariant=not traced))
        manifest = _describe(loaded, folder, graphs)
        _write(folder / MANIFEST_NAME, manifest.to_bytes())
        manifest = _certify(manifest, loaded, folder, accept_accuracy, report)
        _write(folder / MANIFEST_NAME, manifest.to_bytes())
        Encoder(folder)  # the last look is the user's first
        report(f"publishing {target}")
    return manifest


def _write_layout(checkpoint: Checkpoint, folder: Path) -> None:
    """Write sentence-transformers' layout around the graphs, so that other tools find what they look for."""
    for name in _COPIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    _write(folder / "tokenizer.json", checkpoint.tokenizer_json)
    own, special = (
        read_json(checkpoint.folder / name, default={}) for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    tokenizer_config = complete_config(own, special, checkpoint.tokenizer_json, checkpoint.max_seq_length)
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
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
    _write_json(folder / "1_Pooling" / "config.json", _pooling_config(checkpoint))


def _pooling_config(checkpoint: Checkpoint) -> dict[str, object]:
    """The older form where it can say it: every sentence-transformers reads it, and other tools read nothing else."""
    flags = {key: name in checkpoint.pooling for key, name in LEGACY_KEYS.items()}
    if checkpoint.pooling == tuple(name for key, name in LEGACY_KEYS.items() if flags[key]):
        return {"word_embedding_dimension": checkpoint.config.hidden_size, **flags}
    return {"embedding_dimension": checkpoint.config.hidden_size, "pooling_mode": list(checkpoint.pooling)}


def _write_graph(
    checkpoint: Checkpoint,
    folder: Path,
    model: onnx.ModelProto,
    precision: str,
    sites: Mapping[str, Int8Site],
    *,
    batch_invariant: bool,
) -> Graph:
    data = model.SerializeToString(deterministic=True)
    file = _FILES[precision]
    _write(folder / file, data)
    session = Session(data, num_threads=1)
    tokens = Tokenizer(checkpoint.tokenizer_json, checkpoint.max_seq_length)(GOLDEN_TEXTS)
    golden = np.concatenate([session.run([ids]) for ids in tokens.input_ids])
    return Graph(
        file=file,
        precision=precision,
        target="cpu",
        opset=model.opset_import[0].version,
        ir_version=model.ir_version,
        ops=_op_types(model),
        outputs=tuple(output.name for output in model.graph.output),
        batch_invariant=batch_invariant,
        cpu_features=("vnni",) if precision == "int8" else (),
        int8_sites={
            name: manifest_format.Int8Site(alpha=site.alpha, relative_error=site.relative_error)
            for name, site in sites.items()
        },
        certificate=None,
        golden_embeddings=encode_array(golden),
        canary_tolerance=_CANARY_TOLERANCE[precision],
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
            architecture=str(read_json(checkpoint.folder / "config.json")["model_type"]),
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
        encoder = Encoder(folder, precision=graph.precision)
        report(f"certifying {graph.precision}")
        graphs.append(
            dataclasses.replace(graph, certificate=certify(encoder, checkpoint, accept_accuracy=accept_accuracy))
        )
        if ranges is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TruncationWarning)  # a short max_seq_length is meant
                vectors = encoder.encode(range_texts())
            ranges = _ranges(vectors), _ranges(unit_rows(vectors))
    assert ranges is not None
    return dataclasses.replace(
        manifest, graphs=tuple(graphs), embedding_ranges=ranges[0], unit_embedding_ranges=ranges[1]
    )


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
