"""Checkpoints fine-tuned and saved by the real uniem, in an environment of its own, against uniem's own vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from m3e import Encoder
from m3e_export.modules import UNIEM_POOLINGS
from m3e_export.pipeline import convert
from m3e_export.texts import corpus
from tests.encoders import write_encoder
from tests.environments import ROOT, TRANSFORMERS_4, python_with, run_python

TEXTS = [
    "好",
    "今天天气真好，我们去公园散步吧。",
    "How do I reset my password?",
    *corpus("zh")[::80],
    *corpus("en")[::80],
]


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uniem")
    write_encoder(folder / "encoder", "bert")
    (folder / "texts").write_text("\n".join(TEXTS), encoding="utf-8")
    arguments = [str(ROOT / "tests" / "uniem_finetune.py"), str(folder / "encoder"), str(folder), str(folder / "texts")]
    program = f"import runpy, sys; sys.argv = {arguments!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    run_python(python_with(*TRANSFORMERS_4), program, folder)
    return folder


@pytest.mark.interop
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")  # uniem cuts the long text, too
@pytest.mark.parametrize("strategy", UNIEM_POOLINGS)
def test_a_fine_tuned_model_gives_uniems_vectors(fine_tuned: Path, tmp_path: Path, strategy: str) -> None:
    checkpoint = fine_tuned / strategy / "model"
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    assert config["uniem_pooling_strategy"] == strategy
    assert not (checkpoint / "modules.json").exists()
    expected = np.load(fine_tuned / strategy / "vectors.npy")
    manifest = convert(str(checkpoint), tmp_path / "bundle")
    assert manifest.model.pooling == (UNIEM_POOLINGS[strategy],)
    vectors = Encoder(tmp_path / "bundle").encode(TEXTS, normalize_embeddings=True)  # uniem normalises by default
    assert np.abs(vectors - expected).max() <= 2e-6
    before = fine_tuned / "encoder" / "model.safetensors"
    assert (checkpoint / "model.safetensors").read_bytes() != before.read_bytes()  # it was trained
