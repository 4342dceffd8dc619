"""Ours: a bundle, opened by m3e.Encoder."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np


class Engine:
    """One precision of a bundle."""

    PACKAGES = ("onnxruntime", "tokenizers", "numpy")

    @staticmethod
    def prepare(checkpoint: Path, folder: Path, calibration: list[str], precision: str, brief: bool = False) -> None:
        """Convert; the precisions share a bundle. ``brief`` calibrates on these few texts instead of the corpus."""
        from m3e_export.pipeline import convert

        texts = folder / "calibration.txt"
        texts.write_text("\n".join(calibration), encoding="utf-8")
        convert(
            str(checkpoint), folder / "bundle", precisions=("fp32", "int8"), force=True, accept_accuracy=True,
            calibration=texts if brief else None,
        )  # fmt: skip

    def __init__(self, checkpoint: Path, folder: Path, threads: int, precision: str, brief: bool = False) -> None:
        from m3e import Encoder, TruncationWarning

        warnings.simplefilter("ignore", TruncationWarning)  # the peers cut in silence
        self._bundle = folder / "bundle"
        self.encoder = Encoder(self._bundle, precision=precision, num_threads=threads)

    def encode(self, texts: list[str]) -> Any:
        """Embed texts."""
        return self.encoder.encode(texts)

    def profile(self, texts: list[str], max_batch_tokens: int = 1024) -> dict[str, Any]:
        """Run the graph that the encoder runs under onnxruntime's profiler, in batches of similar length.

        Returns:
            Seconds by operator type.
        """
        import onnxruntime

        from m3e.bundle import Bundle
        from m3e.cpu import cpu_features

        bundle = Bundle(self._bundle)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.encoder.num_threads
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.enable_profiling = True
        counts = self.encoder.count_tokens(texts)
        with tempfile.TemporaryDirectory() as place:
            options.profile_file_prefix = str(Path(place) / "profile")
            graph = bundle.graph(self.encoder.precision, "cpu", cpu_features())
            session = onnxruntime.InferenceSession(bundle.read(graph.file), options, providers=["CPUExecutionProvider"])
            order, start = np.argsort(counts, kind="stable"), 0
            while start < len(order):
                length = int(min(bundle.manifest.model.max_seq_length, counts[order[start]]))
                rows = order[start : start + max(1, max_batch_tokens // max(length, 1))]
                session.run(["sentence_embedding"], self.encoder.tokenize([texts[i] for i in rows]))
                start += len(rows)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        seconds: Counter[str] = Counter()
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                seconds[event["args"]["op_name"]] += event["dur"] / 1e6
        return {"seconds": dict(seconds)}
