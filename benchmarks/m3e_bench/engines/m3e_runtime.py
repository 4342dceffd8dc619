"""Ours: a bundle, opened by m3e.Encoder."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any


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

    def profile(self, texts: list[str]) -> dict[str, Any]:
        """Run the graph that the encoder runs under onnxruntime's profiler, in the batches that the encoder makes.

        Returns:
            Seconds by operator type; matrix products of attention apart from those of linear layers.
        """
        import onnxruntime

        from m3e.bundle import Bundle
        from m3e.cpu import cpu_features
        from m3e.feeds import pad
        from m3e.plan import attention_width, plan_batches

        encoder, bundle = self.encoder, Bundle(self._bundle)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1 if encoder.batches_at_once > 1 else encoder.num_threads
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.enable_profiling = True
        tokens, mixed = encoder.tokenize_batch(texts), encoder.mixes_widths
        with tempfile.TemporaryDirectory() as place:
            options.profile_file_prefix = str(Path(place) / "profile")
            graph = bundle.graph(encoder.precision, "cpu", cpu_features())
            session = onnxruntime.InferenceSession(bundle.read(graph.file), options, providers=["CPUExecutionProvider"])
            plan = plan_batches(tokens.n_tokens, encoder.max_batch_tokens, None, encoder.batches_at_once, mixed=mixed)
            for rows in 2 * list(plan):  # once to warm up
                width = attention_width(int(tokens.n_tokens[rows].max()), mixed=mixed)
                session.run(["sentence_embedding"], pad([tokens.input_ids[row] for row in rows], width))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        seconds: Counter[str] = Counter()
        runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
        for event in events:
            timed = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
            if timed and event["ts"] >= runs[len(runs) // 2]:
                seconds[_operator(event["args"])] += event["dur"] / 1e6
        del seconds["If"]  # the time of the nodes in its branch, which are counted
        return {"seconds": dict(seconds)}


def _operator(arguments: dict[str, Any]) -> str:
    """An operator's name; attention's products have a batch and heads before their rows and columns."""
    name: str = arguments["op_name"]
    if name != "MatMulIntegerToFloat":
        return name
    (shape,) = arguments["input_type_shape"][0].values()
    return f"{name} of attention" if len(shape) == 4 else name
