"""optimum's ORTModelForFeatureExtraction, FP32, with the mean taken outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m3e_bench.engines.padded import encode_padded, has_normalize


class Engine:
    """What people write by hand around optimum."""

    PACKAGES = ("optimum-onnx", "onnxruntime", "transformers", "torch")

    @staticmethod
    def prepare(checkpoint: Path, folder: Path, calibration: list[str]) -> None:
        """Export."""
        from optimum.onnxruntime import ORTModelForFeatureExtraction
        from transformers import AutoTokenizer

        ORTModelForFeatureExtraction.from_pretrained(str(checkpoint), export=True).save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(str(checkpoint)).save_pretrained(folder / "model")

    def __init__(self, checkpoint: Path, folder: Path, threads: int) -> None:
        import onnxruntime
        from optimum.onnxruntime import ORTModelForFeatureExtraction
        from transformers import AutoTokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._model = ORTModelForFeatureExtraction.from_pretrained(
            str(folder / "model"), provider="CPUExecutionProvider", session_options=options
        )
        self._tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
        self._normalize = has_normalize(checkpoint)

    def encode(self, texts: list[str]) -> Any:
        """Embed texts."""
        return encode_padded(
            texts, self._tokenizer, lambda inputs: self._model(**inputs).last_hidden_state, normalize=self._normalize
        )
