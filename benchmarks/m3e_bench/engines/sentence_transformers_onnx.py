"""sentence-transformers' ONNX backend, FP32 and with its dynamic INT8."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any


def quantized_file(folder: Path) -> Path:
    """The dynamic INT8 graph; sentence-transformers puts the processor that it is for into its name."""
    (path,) = (folder / "model" / "onnx").glob("model_*.onnx")
    return path


def _target() -> str:
    """The quantisation that the documentation names for this processor."""
    if platform.machine() in ("aarch64", "arm64"):
        return "arm64"
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return next((name for name in ("avx512_vnni", "avx512") if name in flags), "avx2")


class Engine:
    """Exported by optimum, quantised as sentence-transformers' documentation says."""

    PACKAGES = ("sentence-transformers", "optimum-onnx", "onnxruntime", "transformers", "torch")

    @staticmethod
    def prepare(checkpoint: Path, folder: Path, calibration: list[str], int8: bool) -> None:
        """Export once; both precisions lie in the folder, where fastembed finds them too."""
        from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

        model = SentenceTransformer(
            str(checkpoint), backend="onnx", device="cpu", local_files_only=True, model_kwargs={"export": True}
        )
        saved = folder / "model"
        shutil.rmtree(saved, ignore_errors=True)
        model.save_pretrained(str(saved))
        export_dynamic_quantized_onnx_model(model, _target(), str(saved))

    def __init__(self, checkpoint: Path, folder: Path, threads: int, int8: bool) -> None:
        import onnxruntime
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._model = SentenceTransformer(
            str(folder / "model"), backend="onnx", device="cpu", local_files_only=True,
            model_kwargs={
                "file_name": f"onnx/{quantized_file(folder).name if int8 else 'model.onnx'}",
                "provider": "CPUExecutionProvider",
                "session_options": options,
            },
        )  # fmt: skip

    def encode(self, texts: list[str]) -> Any:
        """Embed texts in the default batches of 32, sorted by length."""
        return self._model.encode(texts, show_progress_bar=False)
