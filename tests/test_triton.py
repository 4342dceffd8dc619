"""The Triton repository: its tokenizer and graph, run as Triton would run them, give the encoder's vectors."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from m3e import Encoder
from m3e.cli.main import main

TEXTS = ["今天天气真好", "", "a 🍜", "长" * 600]


class Tensor:
    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self.array


def backend() -> ModuleType:
    """The module that Triton's Python backend gives its models."""
    module = ModuleType("triton_python_backend_utils")
    vars(module).update(
        Tensor=Tensor,
        TritonError=str,
        InferenceResponse=lambda output_tensors=(), error=None: SimpleNamespace(outputs=output_tensors, error=error),
        get_input_tensor_by_name=lambda request, name: request[name],
    )
    return module


@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")
def test_the_parts_give_the_encoders_vectors(
    tiny_bundle: Path, tiny_encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export-triton", str(tiny_bundle), "-o", str(tmp_path), "--name", "m3e"]) == 0
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend())
    space: dict[str, Any] = {}
    exec((tmp_path / "m3e_tokenizer/1/model.py").read_text(encoding="utf-8"), space)
    model = space["TritonPythonModel"]()
    config = (tmp_path / "m3e_tokenizer/config.pbtxt").read_text()
    parameters = {
        key: {"string_value": value}
        for key, value in re.findall(r'key: "(\w+)" value: \{ string_value: "(\w+)"', config)
    }
    model.initialize(
        {"model_repository": str(tmp_path / "m3e_tokenizer"), "model_version": "1",
         "model_config": json.dumps({"parameters": parameters})}
    )  # fmt: skip
    rows = np.array([[text.encode()] for text in TEXTS], dtype=object)
    bad = np.array([[b"\xff"]], dtype=object)
    good, refused = model.execute([{"text": Tensor("text", rows)}, {"text": Tensor("text", bad)}])
    assert refused.error == "text is not UTF-8"
    inputs = {tensor.name: tensor.array for tensor in good.outputs}
    session = onnxruntime.InferenceSession(tmp_path / "m3e_graph/1/model.onnx", providers=["CPUExecutionProvider"])
    (vectors,) = session.run(["sentence_embedding"], inputs)
    np.testing.assert_allclose(vectors, tiny_encoder.encode(TEXTS), atol=2e-5)


def test_the_configurations_join(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export-triton", str(tiny_bundle), "-o", str(tmp_path)]
    assert main([*arguments, "--device", "gpu", "--max-batch-size", "8"]) == 0
    configs = {path.parent.name: path.read_text() for path in tmp_path.glob("*/config.pbtxt")}
    assert set(configs) == {"tiny", "tiny_tokenizer", "tiny_graph"}
    for name, config in configs.items():
        assert f'name: "{name}"\nmax_batch_size: 8\n' in config
        assert config.count("{") == config.count("}")
        assert (tmp_path / name / "1").is_dir()
    assert "KIND_GPU" in configs["tiny_graph"]
    assert re.findall(r'model_name: "(\w+)"', configs["tiny"]) == ["tiny_tokenizer", "tiny_graph"]
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--name", "../x"], "the name is"),
        (["--max-batch-size", "0"], "expected at least 1"),
        (["--precision", "fp8"], "no fp8"),
    ],
)
def test_refusals(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["export-triton", str(tiny_bundle), "-o", str(tmp_path / "r"), *more]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
