"""OpenVINO INT8: NNCF's static quantisation with its transformer preset, as sentence-transformers' backend does it.

That backend needs optimum-intel, which cannot live beside current OpenVINO and transformers; this is what it calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from m3e_bench.engines.padded import encode_padded, has_normalize

_CALIBRATION_TEXTS = 300  # sentence-transformers' and NNCF's default


class Engine:
    """Compiled for latency with all threads on one stream, which is optimum-intel's default."""

    PACKAGES = ("openvino", "nncf", "transformers", "torch")

    @staticmethod
    def prepare(checkpoint: Path, folder: Path, calibration: list[str]) -> None:
        """Trace, quantise, write."""
        import nncf
        import openvino
        import torch
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
        module = AutoModel.from_pretrained(str(checkpoint), attn_implementation="sdpa").eval()

        def inputs_of(text: str) -> dict[str, Any]:
            return dict(tokenizer([text], truncation=True, max_length=512, return_tensors="pt"))

        example = dict(tokenizer(["今天天气真好", "好"], padding=True, return_tensors="pt"))
        shape = openvino.PartialShape([-1, -1])
        with torch.inference_mode():
            model = openvino.convert_model(
                module, example_input=example, input=[(name, shape, openvino.Type.i64) for name in example]
            )
        step = max(1, len(calibration) // _CALIBRATION_TEXTS)
        texts = calibration[::step][:_CALIBRATION_TEXTS]
        dataset = nncf.Dataset(texts, lambda text: {name: value.numpy() for name, value in inputs_of(text).items()})
        quantized = nncf.quantize(
            model, dataset, model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.MIXED,
            subset_size=_CALIBRATION_TEXTS,
        )  # fmt: skip
        openvino.save_model(quantized, folder / "model.xml", compress_to_fp16=False)
        tokenizer.save_pretrained(folder)

    def __init__(self, checkpoint: Path, folder: Path, threads: int) -> None:
        import openvino
        from transformers import AutoTokenizer

        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self._model = openvino.Core().compile_model(folder / "model.xml", "CPU", config)
        self._tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self._normalize = has_normalize(checkpoint)
        self._names = {name for port in self._model.inputs for name in port.get_names()}

    def encode(self, texts: list[str]) -> Any:
        """Embed texts."""

        def forward(inputs: dict[str, Any]) -> Any:
            return self._model({name: np.asarray(value) for name, value in inputs.items() if name in self._names})[0]

        return encode_padded(texts, self._tokenizer, forward, normalize=self._normalize)
