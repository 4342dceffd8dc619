"""sentence-transformers on PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Engine:
    """The reference for accuracy in FP32, and the first thing that people try for speed in BF16."""

    PACKAGES = ("sentence-transformers", "transformers", "torch")

    @staticmethod
    def prepare(checkpoint: Path, folder: Path, calibration: list[str], dtype: str) -> None:
        """Nothing to convert."""

    def __init__(self, checkpoint: Path, folder: Path, threads: int, dtype: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self._model = SentenceTransformer(
            str(checkpoint), device="cpu", local_files_only=True, model_kwargs={"dtype": getattr(torch, dtype)}
        )

    def encode(self, texts: list[str]) -> Any:
        """Embed texts in the default batches of 32, sorted by length."""
        return self._model.encode(texts, show_progress_bar=False, convert_to_tensor=True).float().numpy()
