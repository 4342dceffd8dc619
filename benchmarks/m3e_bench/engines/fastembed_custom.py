"""fastembed with a custom model: the padded graph that optimum exported, FP32 or dynamic INT8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from m3e_bench.engines.sentence_transformers_onnx import quantized_file


class Engine:
    """Batches of 256 in the order given, which is fastembed's default."""

    PACKAGES = ("fastembed", "onnxruntime", "tokenizers")

    @staticmethod
    def prepare(checkpoint: Path, folder: Path, calibration: list[str], int8: bool, exported: str) -> None:
        """Lay the exported files out as fastembed looks for them."""
        source = Path(exported) / "model"
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if not (folder / "special_tokens_map.json").is_file():  # newer transformers keep them elsewhere
            names = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
            content = {f"{name}_token": token for name, token in names.items()}
            (folder / "special_tokens_map.json").write_text(json.dumps(content), encoding="utf-8")
        graph = quantized_file(Path(exported)) if int8 else source / "onnx" / "model.onnx"
        shutil.copyfile(graph, folder / "m.onnx")

    def __init__(self, checkpoint: Path, folder: Path, threads: int, int8: bool, exported: str) -> None:
        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        TextEmbedding.add_custom_model(
            model="local/model", pooling=PoolingType.MEAN, normalization=True,
            sources=ModelSource(hf="local/model"), dim=config["hidden_size"], model_file="m.onnx",
        )  # fmt: skip
        self._model = TextEmbedding("local/model", specific_model_path=str(folder), threads=threads)

    def encode(self, texts: list[str]) -> Any:
        """Embed texts."""
        import numpy as np

        return np.stack(list(self._model.embed(texts)))
