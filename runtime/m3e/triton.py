"""A bundle -> a model repository of Triton Inference Server.

Formats: triton-inference-server/server docs/user_guide/model_configuration.md (config.pbtxt) and ensemble_models.md;
the Python model's interface: triton-inference-server/python_backend README.
"""

from __future__ import annotations

import re
from pathlib import Path

from m3e.bundle import Bundle
from m3e.errors import InputError
from m3e.manifest import Graph

# Runs inside Triton, which has numpy; tokenizers must be installed beside it. Static, so that nothing is templated in.
TOKENIZER_MODEL = '''\
"""Texts -> token ids, as the checkpoint's own tokenizer does it; runs in Triton's Python backend."""

import json
import os

import numpy as np
import tokenizers
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.tokenizer = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        parameters = json.loads(args["model_config"])["parameters"]
        self.tokenizer.enable_truncation(int(parameters["max_seq_length"]["string_value"]))
        self.tokenizer.no_padding()

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        rows = pb_utils.get_input_tensor_by_name(request, "text").as_numpy().reshape(-1)
        try:
            texts = [row.decode("utf-8") for row in rows]
        except UnicodeDecodeError:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("text is not UTF-8"))
        encoded = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        shape = (len(encoded), max(map(len, encoded)))
        input_ids, attention_mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, ids in enumerate(encoded):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("input_ids", input_ids), pb_utils.Tensor("attention_mask", attention_mask)]
        )
'''


def write_repository(
    bundle: Bundle, graph: Graph, folder: Path, *, name: str, device: str, max_batch_size: int
) -> list[Path]:
    """Write the three models.

    The ensemble does not batch: Triton's dynamic batcher would pad texts of all lengths together. The graph gets
    what one request brings.

    Args:
        bundle: The bundle.
        graph: Which of its graphs.
        folder: The repository; other models in it stay.
        name: Of the ensemble; the parts are named after it.
        device: ``cpu`` or ``gpu``.
        max_batch_size: Texts of a request.

    Returns:
        The files written.

    Raises:
        InputError: The name cannot be a folder's, or the repository has such a model.
        BundleError: The bundle is damaged.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise InputError(f"the name is {name!r}, expected letters, digits, '_', '-', '.'; choose another with --name")
    names = {"ensemble": name, "tokenizer": f"{name}_tokenizer", "graph": f"{name}_graph"}
    for part in names.values():
        if (folder / part).exists():
            raise InputError(f"{str(folder / part)!r} is there already; choose another --name or remove it")
    model = bundle.manifest.model
    files: dict[Path, bytes] = {
        Path(names["graph"], "1", "model.onnx"): bundle.read_graph(graph),
        Path(names["graph"], "config.pbtxt"): _graph(
            names["graph"], model.embedding_dim, max_batch_size, device
        ).encode(),
        Path(names["tokenizer"], "1", "tokenizer.json"): bundle.read_tokenizer(),
        Path(names["tokenizer"], "1", "model.py"): TOKENIZER_MODEL.encode(),
        Path(names["tokenizer"], "config.pbtxt"): _tokenizer(
            names["tokenizer"], model.max_seq_length, max_batch_size
        ).encode(),
        Path(name, "config.pbtxt"): _ensemble(names, model.embedding_dim, max_batch_size).encode(),
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / name / "1").mkdir()  # Triton wants a version's folder even where nothing is in it
    return [folder / path for path in files]


def _tensor(name: str, kind: str, dims: str) -> str:
    return f'  {{ name: "{name}" data_type: {kind} dims: [ {dims} ] }}'


_IDS = [_tensor("input_ids", "TYPE_INT64", "-1"), _tensor("attention_mask", "TYPE_INT64", "-1")]


def _config(name: str, max_batch_size: int, inputs: list[str], outputs: list[str], rest: str) -> str:
    ins, outs = ",\n".join(inputs), ",\n".join(outputs)
    head = f'name: "{name}"\nmax_batch_size: {max_batch_size}\n'
    return f"{head}input [\n{ins}\n]\noutput [\n{outs}\n]\n{rest}\n"


def _graph(name: str, dim: int, max_batch_size: int, device: str) -> str:
    kind = "KIND_CPU" if device == "cpu" else "KIND_GPU"
    # Basic: the graph is final, and higher levels fuse it back into slower operators.
    rest = (
        f'platform: "onnxruntime_onnx"\ninstance_group [ {{ kind: {kind} count: 1 }} ]\n'
        "optimization { graph { level: -1 } }"
    )
    return _config(name, max_batch_size, _IDS, [_tensor("sentence_embedding", "TYPE_FP32", str(dim))], rest)


def _tokenizer(name: str, max_seq_length: int, max_batch_size: int) -> str:
    rest = (
        'backend: "python"\ninstance_group [ { kind: KIND_CPU count: 1 } ]\n'
        f'parameters {{ key: "max_seq_length" value: {{ string_value: "{max_seq_length}" }} }}'
    )
    return _config(name, max_batch_size, [_tensor("text", "TYPE_STRING", "1")], _IDS, rest)


def _ensemble(names: dict[str, str], dim: int, max_batch_size: int) -> str:
    def step(part: str, inputs: list[str], outputs: list[str]) -> str:
        maps = [f'input_map {{ key: "{tensor}" value: "{tensor}" }}' for tensor in inputs]
        maps += [f'output_map {{ key: "{tensor}" value: "{tensor}" }}' for tensor in outputs]
        return f'    {{ model_name: "{names[part]}" model_version: -1 {" ".join(maps)} }}'

    ids = ["input_ids", "attention_mask"]
    steps = [step("tokenizer", ["text"], ids), step("graph", ids, ["sentence_embedding"])]
    return _config(
        names["ensemble"],
        max_batch_size,
        [_tensor("text", "TYPE_STRING", "1")],
        [_tensor("sentence_embedding", "TYPE_FP32", str(dim))],
        'platform: "ensemble"\nensemble_scheduling {\n  step [\n' + ",\n".join(steps) + "\n  ]\n}",
    )
