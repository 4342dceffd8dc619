"""An encoder that the builder does not know -> ONNX graph: traced by optimum's exporter, with our pooling behind it.

The traced part computes on padding too and keeps the exporter's operators, so it is slower than a built graph.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from m3e.errors import CheckpointError, DependencyError
from m3e_export.architectures import DECODER, EncoderConfig, refusals
from m3e_export.builder import OPSET, RECTANGLE, GraphBuilder, rename_inputs
from m3e_export.checkpoint import Checkpoint
from m3e_export.files import read_json
from m3e_export.fp16 import INT32, HalfBuilder
from m3e_export.graph import masked_cells, pack
from m3e_export.graph_tensorrt import RectanglePooling
from m3e_export.pooling import AVERAGED
from m3e_export.pooling_graph import PoolingNodes, append_head

_MISSING = (
    "--frontend optimum needs {name}, in an environment of its own because optimum does not work with transformers 5: "
    "python -m venv optimum && optimum/bin/pip install \"m3e-runtime[cpu,export,optimum]\""
)  # fmt: skip


def read_config(folder: Path) -> EncoderConfig:
    """Read the encoder's shape with transformers, which knows each architecture's names for it.

    Raises:
        CheckpointError: transformers does not know the architecture without code from the checkpoint.
        DependencyError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        )
    except ImportError as error:
        raise DependencyError(_MISSING.format(name=error.name)) from error
    path = folder / "config.json"
    if problems := refusals(read_json(path)):
        raise CheckpointError(f"{str(path)!r} cannot be converted: {'; '.join(problems)}")
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises ValueError, KeyError, OSError
        raise CheckpointError(f"transformers cannot read {str(path)!r}: {error}") from error
    # BERTs stand in both tables.
    reads_left_only = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    if config.is_encoder_decoder or getattr(config, "is_decoder", False) or config.model_type in reads_left_only:
        raise CheckpointError(f"{config.model_type} is a decoder; {DECODER}")
    try:
        return EncoderConfig(
            architecture=config.model_type,
            vocab_size=config.vocab_size,
            embedding_size=config.hidden_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=getattr(config, "type_vocab_size", 0),
            # What only the builder asks for.
            task_type_vocab_size=0,
            num_position_buckets=0,
            padding_position=None,
            layer_norm_eps=getattr(config, "layer_norm_eps", 0.0),
            hidden_act=getattr(config, "hidden_act", ""),
        )
    except AttributeError as error:
        raise CheckpointError(
            f"the {config.model_type} configuration has no {error.name}; it is no text encoder"
        ) from error


def trace_encoder(checkpoint: Checkpoint) -> onnx.ModelProto:
    """Trace an encoder.

    Args:
        checkpoint: Where the encoder lies, and how its tokens are pooled.

    Returns:
        A model with inputs ``input_ids`` and ``attention_mask``, int64 (batch, seq_len), and one output, float32
        (batch, seq_len, hidden). Its names begin with ``encoder/``.

    Raises:
        CheckpointError: optimum cannot export the architecture, it needs other inputs than token ids, or the pooling
            needs more than its output.
        DependencyError: optimum is not installed.
    """
    unknown = [name for name in checkpoint.pooling if name in AVERAGED]
    if unknown:
        raise CheckpointError(
            f"--frontend optimum has the last layer's output alone, uniem's pooling {', '.join(unknown)} needs more"
        )
    traced = _name_constants(onnx.compose.add_prefix(_trace(checkpoint.folder), "encoder/", rename_inputs=False))
    inputs = {value.name: value for value in traced.graph.input}
    others = inputs.keys() - {"input_ids", "attention_mask", "token_type_ids"}
    if others:
        raise CheckpointError(f"the traced encoder needs {', '.join(sorted(others))}; supported are token ids alone")
    if "token_type_ids" in inputs:  # one segment
        traced.graph.input.remove(inputs["token_type_ids"])
        traced.graph.node.insert(0, helper.make_node("Sub", ["input_ids", "input_ids"], ["token_type_ids"]))
    return traced


def build_traced_graph(
    encoder: onnx.ModelProto, checkpoint: Checkpoint, *, with_token_embeddings: bool = False
) -> onnx.ModelProto:
    """Append the pooling to a traced encoder.

    Args:
        encoder: What `trace_encoder` has made.
        checkpoint: How its tokens are pooled.
        with_token_embeddings: Also output ``last_hidden_state`` (batch, seq_len, hidden), zero at pads.

    Returns:
        A model with the inputs and outputs of `m3e_export.graph.build_graph`.
    """
    builder = GraphBuilder({"input_ids": RECTANGLE, "attention_mask": RECTANGLE})
    builder.include(encoder.graph.node, encoder.graph.initializer)
    packing, _, _ = pack(builder, None)
    builder.scope("pooling")
    hidden_size = checkpoint.config.hidden_size
    flat = builder.op("Reshape", encoder.graph.output[0].name, builder.int64(-1, hidden_size))
    tokens = builder.op("Gather", flat, packing.token_index)
    pooling = PoolingNodes(builder, packing.cell_index, include_prompt=checkpoint.include_prompt)
    vectors = append_head(builder, checkpoint.head, pooling.pool(checkpoint.pooling, tokens, tokens, tokens))
    outputs: dict[str, tuple[str, list[int | str]]] = {
        "sentence_embedding": (vectors, ["batch", checkpoint.embedding_dim])
    }
    if with_token_embeddings:
        outputs["last_hidden_state"] = (masked_cells(builder, tokens, packing), ["batch", "seq_len", hidden_size])
    return builder.finish(outputs)


def build_traced_gpu_graph(encoder: onnx.ModelProto, checkpoint: Checkpoint) -> onnx.ModelProto:
    """Append the pooling, in FP32, to a traced encoder that may be in FP16.

    Args:
        encoder: What `traced_fp16.to_fp16` has made.
        checkpoint: How its tokens are pooled.

    Returns:
        A model of standard operators with the inputs and the output of `graph_tensorrt.build_tensorrt_graph`.
    """
    builder = HalfBuilder({"input_ids": (INT32, ["batch", "seq_len"]), "lengths": (INT32, ["batch"])}, ())
    builder.scope("pooling")
    pooling = RectanglePooling(builder)
    nodes = copy.deepcopy(list(encoder.graph.node))
    ids = builder.op("Cast", "input_ids", to=onnx.TensorProto.INT64)
    rename_inputs(nodes, {"input_ids": ids, "attention_mask": pooling.attention_mask})
    builder.include(nodes, encoder.graph.initializer)
    tokens = encoder.graph.output[0].name
    vectors = append_head(builder, checkpoint.head, pooling.pool(checkpoint.pooling, tokens, tokens, tokens))
    return builder.finish({"sentence_embedding": (vectors, ["batch", checkpoint.embedding_dim])})


def _trace(folder: Path) -> onnx.ModelProto:
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as error:
        raise DependencyError(_MISSING.format(name=error.name)) from error
    with tempfile.TemporaryDirectory(prefix="m3e-") as target, warnings.catch_warnings():
        # The tracer's, about Python values that become constants: the certificate tells.
        warnings.simplefilter("ignore")
        try:
            main_export(
                str(folder),
                target,
                task="feature-extraction",
                library_name="transformers",
                opset=OPSET,
                do_validation=False,  # against the same reference on one text; the certificate has many
                no_post_process=True,
                trust_remote_code=False,
            )
        except Exception as error:  # optimum, transformers and torch raise their own
            raise CheckpointError(f"optimum cannot export {str(folder)!r} ({type(error).__name__}: {error})") from error
        return onnx.load(str(Path(target) / "model.onnx"))


def _name_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make every constant an initializer that its readers read directly, not through nodes."""
    names: dict[str, str] = {}
    constants = {tensor.name for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            constants.add(tensor.name)
        elif node.op_type == "Identity" and node.input[0] in constants:
            names[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    rename_inputs(nodes, names)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
