"""infinity's embedding engine in process, without its HTTP server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any


class Engine:
    """Its own queue and batches of 32; the torch engine, which pools as the checkpoint says."""

    PACKAGES = ("infinity-emb", "sentence-transformers", "transformers", "torch")

    @staticmethod
    def prepare(checkpoint: Path, folder: Path, calibration: list[str]) -> None:
        """Nothing to convert."""

    def __init__(self, checkpoint: Path, folder: Path, threads: int) -> None:
        import os

        os.environ["DO_NOT_TRACK"] = "1"
        import torch
        from infinity_emb import AsyncEmbeddingEngine, EngineArgs

        torch.set_num_threads(threads)
        self._loop = asyncio.new_event_loop()
        self._engine = AsyncEmbeddingEngine.from_args(
            EngineArgs(
                model_name_or_path=str(checkpoint),
                engine="torch",
                device="cpu",
                dtype="float32",
                bettertransformer=False,
                model_warmup=False,
                compile=False,
            )
        )
        self._loop.run_until_complete(self._engine.astart())

    def encode(self, texts: list[str]) -> Any:
        """Embed texts."""
        import numpy as np

        embeddings, _ = self._loop.run_until_complete(self._engine.embed(sentences=texts))
        return np.stack(embeddings)
