"""The checkpoints that docs/checkpoints.md names: small ones laid out alike, against transformers on the folder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.checkpoints import write_json
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.modules import UNIEM_POOLINGS
from m3e_export.sources import LocalCheckpoint
from tests.agreement import TEXTS, TOLERANCE, agree, embedder, encoder_folder, hidden_states, unit
from tests.encoders import HIDDEN, write_modules
from tests.environments import ROOT

INSTRUCTION = "为这个句子生成表示以用于检索相关文章："
HEAD = {"cls.predictions.bias": torch.zeros(3), "cls.seq_relationship.weight": torch.zeros(2, HIDDEN)}


@dataclass(frozen=True)
class Layout:
    """How a checkpoint lies on disk, and what its vectors are.

    Attributes:
        pooling: What is computed of the tokens, by the names of `pool`.
        kind: The encoder, a key of `tests.encoders.KINDS`.
        id: Name on the hub.
        config: Fields of config.json.
        modules: Poolings in modules.json, and Normalize behind them; none without that file.
        pooling_file: 1_Pooling/config.json in its older form, instead of what modules.json brings.
        prompts: In config_sentence_transformers.json.
        pickled: Whether the weights are a pytorch_model.bin, with the names and heads of pre-training.
    """

    pooling: str
    kind: str = "bert"
    id: str = "some-org/bert"
    config: dict[str, Any] = field(default_factory=dict)
    modules: tuple[list[str], str] | None = None
    pooling_file: dict[str, bool] | None = None
    prompts: dict[str, str] | None = None
    pickled: bool = False


KEYS = ("uniem_pooling_strategy", "uniem_embedding_strategy")
CLS, MEAN = {"pooling_mode_cls_token": True}, {"pooling_mode_mean_tokens": True}
# By the first column of the page's table.
LAYOUTS: dict[str, dict[str, Layout]] = {
    "moka-ai/m3e-small, -base, -large": {
        "modules": Layout("mean", modules=(["mean"], "")),
        "uniem": Layout("mean", id="moka-ai/m3e-small", config={"uniem_embedding_strategy": "last_mean"}),
        "name": Layout("mean", id="moka-ai/m3e-base"),
    },
    "fine-tuned with uniem's `FineTuner`": {
        f"{key}, {strategy}": Layout(strategy, config={key: strategy}) for key in KEYS for strategy in UNIEM_POOLINGS
    },
    "fine-tuned with sentence-transformers": {
        f"{key}, {strategy}": Layout("mean", config={key: strategy}, modules=(["mean"], ""))
        for key in KEYS
        for strategy in UNIEM_POOLINGS
    },
    "text2vec (shibing624)": {
        "bert": Layout("mean", id="shibing624/text2vec-base-chinese"),
        "ernie": Layout("mean", kind="ernie", id="shibing624/text2vec-base-chinese-paraphrase"),
    },
    "bge-zh": {
        "legacy": Layout("cls, normalised", modules=(["cls"], "Normalize"), pooling_file=CLS,
                         prompts={"query": INSTRUCTION}),
    },
    "gte (BERT)": {
        "mean": Layout("mean", modules=(["mean"], ""), pooling_file=MEAN),
        "cls": Layout("cls, normalised", modules=(["cls"], "Normalize"), pooling_file=CLS),
    },
    "uer, Erlangshen": {
        "uer": Layout("mean", modules=(["mean"], ""), pooling_file=MEAN, pickled=True),
        "Erlangshen": Layout("cls", config={"architectures": ["BertForMaskedLM"]}, pooling_file=CLS, pickled=True),
    },
}  # fmt: skip
# Several poolings at once and Dense are rows of tests/test_architectures.py.


def write(folder: Path, layout: Layout) -> Checkpoint:
    """Lay the checkpoint out and read it."""
    source = encoder_folder(layout.kind)
    folder.mkdir()
    for file in source.iterdir():
        if file.name != "config.json" and not (layout.pickled and file.name == "model.safetensors"):
            (folder / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | layout.config)
    if layout.pickled:
        tensors = safetensors.torch.load_file(source / "model.safetensors")
        torch.save({f"bert.{name}": tensor for name, tensor in tensors.items()} | HEAD, folder / "pytorch_model.bin")
    if layout.modules is not None:
        write_modules(folder, *layout.modules)
    if layout.pooling_file is not None:
        write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": HIDDEN, **layout.pooling_file})
    if layout.prompts is not None:
        write_json(folder / "config_sentence_transformers.json", {"prompts": layout.prompts})
    return load_checkpoint(LocalCheckpoint(folder, layout.id, None))


def pool(words: Any, first: Any, last: Any, how: str) -> Any:
    """The vector of one text's tokens, by uniem's names (uniem 0.3.3, uniem/model.py)."""
    name, _, normalised = how.partition(", ")
    weights = np.arange(1, len(last) + 1)[:, None]
    vector = {
        "cls": last[0],
        "mean": last.mean(axis=0),
        "last_mean": last.mean(axis=0),
        "first_last_mean": (first.mean(axis=0) + last.mean(axis=0)) / 2,
        "embedding_last_mean": (words.mean(axis=0) + last.mean(axis=0)) / 2,
        "last_weighted": (last * weights).sum(axis=0) / weights.sum(),
    }[name]
    return unit(vector) if normalised else vector


def rows() -> list[Any]:
    """Every layout in both precisions; by default FP32 of five in each row of the page, and INT8 of the first."""
    return [
        pytest.param(layout, precision, id=f"{name}: {detail}, {precision}",
                     marks=() if i < {"fp32": 5, "int8": 1}[precision] else pytest.mark.long)
        for name, layouts in LAYOUTS.items()
        for i, (detail, layout) in enumerate(layouts.items())
        for precision in ("fp32", "int8")
    ]  # fmt: skip


@pytest.mark.parametrize(("layout", "precision"), rows())
def test_it_gives_transformers_vectors(layout: Layout, precision: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint", layout)
    vectors = embedder(layout.kind, checkpoint, precision)(TEXTS)
    expected = np.stack([pool(*states, layout.pooling) for states in hidden_states(tmp_path / "checkpoint")])
    agree(vectors, expected, precision)


def test_a_bge_prompt_is_sentence_transformers_prompt(tmp_path: Path) -> None:
    layout = LAYOUTS["bge-zh"]["legacy"]
    checkpoint = write(tmp_path / "checkpoint", layout)
    assert checkpoint.prompts == layout.prompts
    texts = [text for text in TEXTS if len(text) < 200]
    model = SentenceTransformer(str(tmp_path / "checkpoint"), device="cpu")
    expected = model.encode(texts, prompt_name="query", show_progress_bar=False)
    found = embedder("bert", checkpoint, "fp32")([INSTRUCTION + text for text in texts])
    assert np.abs(found - expected).max() <= TOLERANCE


@pytest.mark.checkout
def test_the_page_names_these_checkpoints() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    table = page.partition("## Which checkpoints that means")[2].partition("\n## ")[0]
    names = re.findall(r"(?m)^\| (.+?) \|", table)[1:]
    assert names == list(LAYOUTS)
