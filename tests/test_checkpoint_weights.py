"""Weights that are read or refused, in every form of file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from benchmarks.checkpoints import write_json
from m3e import CheckpointError, DependencyError
from m3e_export.architectures import ARCHITECTURES
from m3e_export.weights import read_weights
from tests.edited_checkpoint import (
    BIAS,
    QUERY,
    TENSORS,
    folder,
    load,
    renamed,
)

__all__ = ["folder"]

TENSORFLOW = {name.replace("Norm.bias", "Norm.beta"): t for name, t in renamed(r"Norm\.weight", "Norm.gamma").items()}
HEADS = (
    "pooler.dense.weight", "bert.pooler.dense.bias", "cls.predictions.bias", "bert.embeddings.position_ids",
    "cls.seq_relationship.weight", "classifier.weight", "qa_outputs.bias",
)  # fmt: skip


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        pytest.param(TENSORS, torch.float32, id="plain"),
        pytest.param(renamed("^", "bert."), torch.float32, id="bert. prefix"),
        pytest.param(TENSORFLOW, torch.float32, id="TensorFlow's names"),
        pytest.param({**TENSORS, **{name: np.arange(3) for name in HEADS}}, torch.float32, id="heads"),
        pytest.param(TENSORS, torch.float16, id="float16"),
        pytest.param(TENSORS, torch.bfloat16, id="bfloat16"),
    ],
)
def test_weights_are_read_as_float32(tmp_path: Path, file: str, given: dict[str, Any], dtype: torch.dtype) -> None:
    save = safetensors.torch.save_file if file == "model.safetensors" else torch.save
    save({name: torch.from_numpy(tensor).to(dtype) for name, tensor in given.items()}, tmp_path / file)
    tensors, _ = read_weights(tmp_path, ARCHITECTURES["bert"])
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, torch.from_numpy(TENSORS[name]).to(dtype).float().numpy())


def test_bfloat16_is_read_before_anything_imports_onnx(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.tensor([1.5], dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    code = f"import pathlib, sys; sys.path[:] = {sys.path!r}; from m3e_export.weights import read_tensors"
    code += (
        f"; print(read_tensors([pathlib.Path({str(tmp_path)!r}) / 'model.safetensors'])['a'], 'onnx' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[1.5] False\n"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (canary,)

    canary, path = tmp_path / "canary", tmp_path / "pytorch_model.bin"
    torch.save({"weight": Payload()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin' cannot be read as a PyTorch state dict"):
        read_weights(tmp_path, ARCHITECTURES["bert"])
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # the payload does work


def test_pickled_weights_without_torch_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DependencyError, match=r'pip install "m3e-runtime\[torch\]"'):
        read_weights(tmp_path, ARCHITECTURES["bert"])


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        pytest.param({QUERY: None}, [f"{QUERY} is missing"], id="missing"),
        pytest.param({QUERY: None, BIAS: None}, [f"{QUERY} is missing", f"{BIAS} is missing"], id="two missing"),
        pytest.param(dict.fromkeys(TENSORS, None) | {"a": TENSORS[BIAS]}, ["and 30 more"], id="all missing"),
        pytest.param({BIAS: TENSORS[QUERY]}, [f"{BIAS} has shape (64, 64), config.json says (64,)"], id="shape"),
        pytest.param({BIAS: TENSORS[BIAS] * np.nan}, [f"{BIAS} has values that are not finite"], id="NaN"),
        pytest.param({BIAS: TENSORS[BIAS] * np.inf}, [f"{BIAS} has values that are not finite"], id="infinity"),
        pytest.param({"extra.bias": TENSORS[BIAS]}, ["extra.bias is unknown in a bert encoder"], id="unknown"),
    ],
)
def test_weights_that_do_not_fit(folder: Path, changes: dict[str, Any], problems: list[str]) -> None:
    tensors = {name: tensor for name, tensor in (TENSORS | changes).items() if tensor is not None}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not fit") as caught:
        load(folder)
    assert [problem for problem in problems if problem not in str(caught.value)] == []


@pytest.mark.parametrize("name", ["base_model.model.encoder.layer.0.attention.self.query.lora_A.weight",
                                  "bert.encoder.layer.0.attention.self.query.lora_B.default.weight"])  # fmt: skip
def test_an_adapter_that_is_not_merged_is_refused(folder: Path, name: str) -> None:
    safetensors.numpy.save_file({**TENSORS, name: TENSORS[BIAS]}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds? an adapter that is not merged .*merge_and_unload"):
        load(folder)


def test_a_tensor_under_two_names_is_refused(folder: Path) -> None:
    safetensors.numpy.save_file({**TENSORS, f"bert.{BIAS}": TENSORS[BIAS]}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"hold {BIAS} twice"):
        load(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_several_files(folder: Path, file: str) -> None:
    whole = load(folder)
    (folder / "model.safetensors").unlink()
    stem, suffix = file.split(".")
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    names = sorted(TENSORS)
    where: dict[str, str] = {}
    for i in range(2):
        part = {name: torch.from_numpy(TENSORS[name]) for name in names[i::2]}
        save(part, folder / f"{stem}-{i + 1:05}-of-00002.{suffix}")
        where |= dict.fromkeys(part, f"{stem}-{i + 1:05}-of-00002.{suffix}")
    write_json(folder / f"{file}.index.json", {"weight_map": where})
    found = load(folder)
    assert found.weights_sha256 != whole.weights_sha256
    for name in names:
        np.testing.assert_array_equal(found.tensors[name], whole.tensors[name])
