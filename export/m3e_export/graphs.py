"""The graphs that a bundle can hold: which there are, and how each is built and described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from m3e import manifest as manifest_format
from m3e.cpu import cpu_features
from m3e.errors import ExportError
from m3e.manifest import Graph, encode_array
from m3e.session import Session
from m3e.tokenizer import Tokenizer
from m3e_export.checkpoint import Checkpoint
from m3e_export.emulate import emulated_session
from m3e_export.fit import Int8Site
from m3e_export.graph import build_graph
from m3e_export.graph_cuda import build_cuda_graph
from m3e_export.graph_tensorrt import build_tensorrt_graph
from m3e_export.int8 import Int8Steps
from m3e_export.layout import write
from m3e_export.optimum_frontend import build_traced_gpu_graph, build_traced_graph
from m3e_export.texts import GOLDEN_TEXTS
from m3e_export.traced_fp16 import to_fp16
from m3e_export.traced_int8 import to_int8


@dataclass(frozen=True, slots=True)
class Kind:
    """A graph that can be made.

    Attributes:
        file: Its place in the bundle.
        precision: ``fp32``, ``int8`` or ``fp16``.
        target: What it runs on; the fp32 graph for ``cpu`` runs with CUDA too.
        canary_tolerance: As `m3e.manifest.Graph` has it.
        cpu: Name of the processors that it is for; empty where it does not matter.
        cpu_features: What they must have.
        max_level: Largest absolute weight level of an int8 graph.
    """

    file: str
    precision: str
    target: str
    canary_tolerance: float
    cpu: str = ""
    cpu_features: tuple[str, ...] = ()
    max_level: int = 127


# Canaries: another processor adds the same products in another order, which now and then moves an 8-bit level by one:
# measured 1e-7 for fp32 and up to 1.5e-4 for int8. 8-bit sums that saturate move every vector by 1e-3 and more.
# On a GPU every store is rounded to FP16, and a sum that falls on the other side of a rounding moves an 8-bit level.
# Levels: without VNNI two products of 8 bits are added in 16 bits and saturate; 2 x 255 x 63 is the most that fits.
KINDS = (
    Kind("onnx/model.onnx", "fp32", "cpu", 1e-5),
    Kind("onnx/model_int8.onnx", "int8", "cpu", 5e-4, cpu="vnni", cpu_features=("vnni",)),
    Kind("onnx/model_int8_avx2.onnx", "int8", "cpu", 5e-4, cpu="avx2", max_level=63),
    Kind("onnx/model_fp16.onnx", "fp16", "cuda", 2e-3),
    Kind("onnx/model_fp16_plain.onnx", "fp16", "tensorrt", 2e-3),
    Kind("onnx/model_int8_plain.onnx", "int8", "tensorrt", 1e-2),
)


def choose_kinds(
    precisions: Sequence[str], targets: Sequence[str], cpus: Sequence[str] | None, *, traced: bool = False
) -> list[Kind]:
    """Find the graphs to make: every pair of precision and target that there is a graph for.

    Args:
        precisions: What was asked for.
        targets: What they are to run on.
        cpus: Processors to make int8 graphs for; None for one like this.
        traced: Whether the graphs are made of a traced encoder, which is quantised for the CPU alone.

    Raises:
        ExportError: A precision or a target that is left without a graph; or a processor that this one is not: its
            graph could not be certified here.
    """
    features = cpu_features()
    able = [kind.cpu for kind in KINDS if kind.cpu and (features is None or features.issuperset(kind.cpu_features))]
    unable = [name for name in cpus or () if name not in able]
    if unable:
        raise ExportError(
            f"this processor lacks {', '.join(unable)}: it would compute other sums, and the graph's certificate and "
            "golden vectors would be wrong. Convert on a processor that has it, or with '--cpu avx2', which runs "
            "anywhere"
        )
    cpus = able[:1] if cpus is None else cpus
    able_kinds = [kind for kind in KINDS if not (traced and (kind.precision, kind.target) == ("int8", "tensorrt"))]
    kinds = [
        kind
        for kind in able_kinds
        if kind.precision in precisions and kind.target in targets and kind.cpu in ("", *cpus)
    ]
    known = ", ".join(dict.fromkeys(f"{kind.precision} for {kind.target}" for kind in able_kinds))
    made = {name for kind in kinds for name in (kind.precision, kind.target)}
    for noun, asked in (("precision", precisions), ("target", targets)):
        for name in asked:
            if name not in made:
                frontend = " with --frontend optimum" if traced else ""
                raise ExportError(f"{noun} {name} is left without a graph; there are{frontend} {known}")
    return kinds


def check_kind(checkpoint: Checkpoint, kind: Kind) -> None:
    """Refuse what a GPU's graph cannot do.

    Raises:
        ExportError: The target has no graph for this model.
    """
    if kind.target == "cpu":
        return
    if not checkpoint.include_prompt:
        raise ExportError(
            f"this model leaves its prompts out of the pooling, which the graphs for {kind.target} do not do; use "
            "--target cpu"
        )
    if kind.target == "cuda" and checkpoint.config.num_position_buckets:
        # PackedMultiHeadAttention takes a bias as wide as the batch, and a packed graph knows no width.
        raise ExportError(
            f"{checkpoint.config.architecture} attends with relative positions, which the packed attention for cuda "
            "does not; use --target cpu, whose fp32 graph runs with CUDA too, or tensorrt"
        )


def build_model(
    checkpoint: Checkpoint,
    encoder: onnx.ModelProto | None,
    kind: Kind,
    int8_sites: Mapping[str, Int8Site] | None,
    fp32_sites: Sequence[str],
    *,
    with_token_embeddings: bool,
) -> onnx.ModelProto:
    """Build a graph of a checkpoint.

    Args:
        checkpoint: The model.
        encoder: Its encoder as `optimum_frontend.trace_encoder` has traced it; None to build it from the weights.
        kind: Which graph.
        int8_sites: What calibration made, for an int8 graph.
        fp32_sites: What FP16 cannot hold, for a GPU's graph.
        with_token_embeddings: Also output ``last_hidden_state``; graphs for a GPU have none.
    """
    if encoder is not None:
        if kind.target != "cpu":
            return build_traced_gpu_graph(to_fp16(encoder, fp32_sites), checkpoint)
        exact = build_traced_graph(encoder, checkpoint, with_token_embeddings=with_token_embeddings)
        return exact if int8_sites is None else to_int8(exact, int8_sites)
    if kind.target == "cuda":
        return build_cuda_graph(checkpoint, fp32_sites)
    if kind.target == "tensorrt":
        return build_tensorrt_graph(checkpoint, fp32_sites, int8_sites)
    int8 = None if int8_sites is None else partial(Int8Steps, sites=int8_sites, signed=kind.max_level == 127)
    return build_graph(checkpoint, int8, with_token_embeddings=with_token_embeddings)


def write_graph(
    checkpoint: Checkpoint,
    folder: Path,
    kind: Kind,
    model: onnx.ModelProto,
    *,
    int8_sites: Mapping[str, Int8Site],
    fp32_sites: Sequence[str],
) -> Graph:
    """Write a graph into a folder, embed the golden texts with it, and describe it."""
    on_gpu = kind.target != "cpu"
    data = model.SerializeToString(deterministic=True)
    write(folder / kind.file, data)
    session = emulated_session(data) if on_gpu else Session(data, num_threads=1)
    tokens = Tokenizer(checkpoint.tokenizer_json, checkpoint.max_seq_length)(GOLDEN_TEXTS)
    golden = np.concatenate([session.run([ids]) for ids in tokens.input_ids])
    return Graph(
        file=kind.file,
        precision=kind.precision,
        target=kind.target,
        opset=model.opset_import[0].version,
        ir_version=model.ir_version,
        ops=_op_types(model.graph),
        outputs=tuple(output.name for output in model.graph.output),
        # A GPU's library chooses its kernels by the size of the batch.
        batch_invariant=not on_gpu,
        cpu_features=kind.cpu_features,
        int8_sites={
            name: manifest_format.Int8Site(alpha=site.alpha, relative_error=site.relative_error)
            for name, site in int8_sites.items()
            if not on_gpu or name not in fp32_sites
        },
        fp32_sites=tuple(fp32_sites) if on_gpu else (),
        certificate=None,
        golden_embeddings=encode_array(golden),
        canary_tolerance=kind.canary_tolerance,
    )


def _op_types(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Every operator, those in the branches of an If as well."""
    own = {f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.node}
    branches = (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    return tuple(sorted(own.union(*map(_op_types, branches))))
