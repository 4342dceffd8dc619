"""CTranslate2 INT8: dynamic scales for each token, padding removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from m3e_bench.engines.padded import encode_padded, has_normalize


class Engine:
    """Converted by its own converter; the mean is taken outside."""

    PACKAGES = ("ctranslate2", "transformers")

    @staticmethod
    def prepare(checkpoint: Path, folder: Path, calibration: list[str]) -> None:
        """Convert."""
        from ctranslate2.converters import TransformersConverter
        from transformers import AutoTokenizer

        TransformersConverter(str(checkpoint)).convert(str(folder / "model"), quantization="int8", force=True)
        AutoTokenizer.from_pretrained(str(checkpoint)).save_pretrained(folder / "tokenizer")

    def __init__(self, checkpoint: Path, folder: Path, threads: int) -> None:
        import ctranslate2
        from transformers import AutoTokenizer

        self._encoder = ctranslate2.Encoder(
            str(folder / "model"), device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )
        self._tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
        self._normalize = has_normalize(checkpoint)

    def encode(self, texts: list[str]) -> Any:
        """Embed texts."""
        import ctranslate2

        def forward(inputs: dict[str, Any]) -> Any:
            ids = ctranslate2.StorageView.from_array(np.ascontiguousarray(inputs["input_ids"], dtype=np.int32))
            lengths = np.ascontiguousarray(inputs["attention_mask"].sum(axis=1), dtype=np.int32)
            output = self._encoder.forward_batch(ids, ctranslate2.StorageView.from_array(lengths))
            return np.asarray(output.last_hidden_state)

        return encode_padded(texts, self._tokenizer, forward, normalize=self._normalize)
