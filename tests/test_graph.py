from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from m3e_export.builder import RECTANGLE, GraphBuilder
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.graph import build_graph
from m3e_export.reference import numpy_token_embeddings
from m3e_export.sources import fetch_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(fetch_checkpoint(str(tiny_checkpoint)))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> onnx.ModelProto:
    return build_graph(checkpoint, with_token_embeddings=True)


def run(model: onnx.ModelProto, ids: Any, mask: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {"input_ids": np.array(ids, np.int64), "attention_mask": np.array(mask, np.int64)}
    embedding, hidden = session.run(["sentence_embedding", "last_hidden_state"], inputs)
    return embedding, hidden


def test_it_is_what_the_contract_says(model: onnx.ModelProto) -> None:
    assert (model.opset_import[0].version, model.ir_version) == (20, 10)
    assert {opset.domain for opset in model.opset_import} == {"", "com.microsoft"}
    assert [item.name for item in model.graph.input] == ["input_ids", "attention_mask"]
    assert [item.name for item in model.graph.output] == ["sentence_embedding", "last_hidden_state"]
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_the_last_hidden_state_is_the_references_and_zero_at_pads(
    model: onnx.ModelProto, checkpoint: Checkpoint
) -> None:
    _, hidden = run(model, [[2, 300, 400, 3], [2, 500, 3, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_allclose(hidden[0], numpy_token_embeddings(checkpoint, [2, 300, 400, 3]), atol=2e-6)
    np.testing.assert_allclose(hidden[1, :3], numpy_token_embeddings(checkpoint, [2, 500, 3]), atol=2e-6)
    assert not hidden[1, 3].any()


@pytest.mark.parametrize("pad", [0, 7, 21127], ids=["pad id 0", "any id", "the last id"])
def test_what_stands_under_a_pad_does_not_matter(model: onnx.ModelProto, pad: int) -> None:
    clean, _ = run(model, [[2, 300, 3]], [[1, 1, 1]])
    padded, _ = run(model, [[2, 300, 3, pad, pad], [2, 8, 9, 10, 3]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    np.testing.assert_allclose(padded[0], clean[0], atol=1e-6)


def test_a_pad_token_in_the_text_is_a_token_like_any_other(model: onnx.ModelProto, checkpoint: Checkpoint) -> None:
    embedding, _ = run(model, [[2, 0, 0, 3]], [[1, 1, 1, 1]])
    expected = numpy_token_embeddings(checkpoint, [2, 0, 0, 3]).mean(axis=0)
    np.testing.assert_allclose(embedding[0], expected, atol=2e-6)


def test_left_padding_counts_positions_as_pytorch_does(model: onnx.ModelProto, tiny_checkpoint: Path) -> None:
    import torch
    from transformers import BertModel

    ids, mask = [[0, 0, 2, 300, 3], [2, 8, 9, 10, 3]], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    embedding, _ = run(model, ids, mask)
    bert: torch.nn.Module = BertModel.from_pretrained(tiny_checkpoint, add_pooling_layer=False)
    with torch.inference_mode():
        hidden = bert(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    np.testing.assert_allclose(embedding[0], hidden[0, 2:].mean(dim=0).numpy(), atol=2e-6)


def test_a_row_without_tokens_gives_zeros_and_leaves_its_neighbour_alone(model: onnx.ModelProto) -> None:
    embedding, _ = run(model, [[2, 300, 3], [0, 0, 0]], [[1, 1, 1], [0, 0, 0]])
    alone, _ = run(model, [[2, 300, 3]], [[1, 1, 1]])
    np.testing.assert_allclose(embedding[0], alone[0], atol=1e-6)
    assert not embedding[1].any()


def test_what_nothing_reads_is_left_out() -> None:
    builder = GraphBuilder({"input_ids": RECTANGLE, "attention_mask": RECTANGLE})
    unread = builder.op("Add", "input_ids", builder.const("unread", 7, np.int64))
    builder.op("Neg", unread)
    read = builder.op("Cast", "input_ids", to=onnx.TensorProto.FLOAT)
    condition = builder.op("Equal", builder.op("ReduceMax", "attention_mask", keepdims=0), builder.const("one", 1))
    chosen = builder.choose(condition, lambda: builder.op("Neg", read), lambda: builder.op("Abs", read))
    graph = builder.finish({"y": (chosen, ["batch", "seq_len"])}).graph
    assert [node.op_type for node in graph.node] == ["Cast", "ReduceMax", "Equal", "If", "Identity"]
    assert [tensor.name for tensor in graph.initializer] == ["one"]


def test_an_initializers_name_stands_for_one_value() -> None:
    builder = GraphBuilder({"input_ids": RECTANGLE})
    assert builder.const("one", 1, np.int64) == builder.const("one", 1, np.int64) == "one"
    with pytest.raises(AssertionError, match="two initializers would be called one"):
        builder.const("one", 1, np.int32)


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Checkpoint) -> None:
    first, second = (build_graph(checkpoint).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
