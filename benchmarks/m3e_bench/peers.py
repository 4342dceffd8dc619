"""The engines that are compared, and where each one's packages live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from m3e import InputError


@dataclass(frozen=True, slots=True)
class Engine:
    """One line of every table.

    Attributes:
        name: In commands and records.
        title: In tables and charts.
        module: File in engines/.
        environment: Name of its requirements file in environments/; None for the runner's own interpreter.
        precision: Of the weights.
        options: Arguments of the engine's class.
        after: Engine whose prepared files this one starts from.
    """

    name: str
    title: str
    module: str
    environment: str | None
    precision: str
    options: Mapping[str, Any] = field(default_factory=dict)
    after: str | None = None

    @property
    def ours(self) -> bool:
        """Whether it is this project's runtime."""
        return self.module == "m3e_runtime"


REFERENCE = "st-torch-fp32"

ENGINES = (
    Engine("m3e-int8", "m3e INT8", "m3e_runtime", None, "int8", {"precision": "int8"}),
    Engine("m3e-fp32", "m3e FP32", "m3e_runtime", None, "fp32", {"precision": "fp32"}),
    Engine(
        REFERENCE, "sentence-transformers, torch FP32", "sentence_transformers_torch", "torch", "fp32",
        {"dtype": "float32"},
    ),
    Engine(
        "st-torch-bf16", "sentence-transformers, torch BF16", "sentence_transformers_torch", "torch", "bf16",
        {"dtype": "bfloat16"},
    ),
    Engine(
        "st-onnx-int8", "sentence-transformers, ONNX dynamic INT8", "sentence_transformers_onnx", "onnx", "int8",
        {"int8": True},
    ),
    Engine("openvino-int8", "OpenVINO INT8 (NNCF)", "openvino_int8", "openvino", "int8"),
    Engine("ctranslate2-int8", "CTranslate2 INT8", "ctranslate2_int8", "ctranslate2", "int8"),
    Engine("fastembed-fp32", "fastembed FP32", "fastembed_custom", "fastembed", "fp32", {"int8": False},
           after="st-onnx-int8"),
    Engine("fastembed-int8", "fastembed dynamic INT8", "fastembed_custom", "fastembed", "int8", {"int8": True},
           after="st-onnx-int8"),
    Engine("optimum-fp32", "optimum ORTModel FP32", "optimum_ortmodel", "onnx", "fp32"),
    Engine("infinity-fp32", "infinity, torch FP32", "infinity_torch", "infinity", "fp32"),
)  # fmt: skip
# Not engines: the matrix products of our own graphs, which no engine on onnxruntime can pass.
BOUNDS = (
    Engine("gemm-int8", "INT8 matrix products alone", "gemm_bound", None, "int8", {"precision": "int8"}),
    Engine("gemm-fp32", "FP32 matrix products alone", "gemm_bound", None, "fp32", {"precision": "fp32"}),
)
QUICK = ("m3e-int8", "m3e-fp32", REFERENCE)


def by_name(name: str) -> Engine:
    """One of ``ENGINES``."""
    return next(engine for engine in ENGINES if engine.name == name)


def choose(names: list[str] | None, endpoints: list[str]) -> list[Engine]:
    """Pick engines by name and add HTTP endpoints.

    Args:
        names: Of ``ENGINES``; None for all.
        endpoints: ``NAME=URL``, optionally ``NAME=URL,model=...,key_variable=...``.

    Raises:
        InputError: A name that does not exist, or an endpoint that cannot be read.
    """
    known = {engine.name: engine for engine in ENGINES}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise InputError(f"there are no engines {unknown}; there are {', '.join(known)}")
    return [known[name] for name in (known if names is None else names)] + [_endpoint(text) for text in endpoints]


def _endpoint(text: str) -> Engine:
    name, _, rest = text.partition("=")
    url, *settings = rest.split(",")
    options = dict(setting.partition("=")[::2] for setting in settings)
    if not url.startswith(("http://", "https://")) or set(options) - {"model", "key_variable"}:
        raise InputError(
            f"the endpoint is {text!r}, expected NAME=http://HOST:PORT/v1, then ,model=NAME or ,key_variable=NAME"
        )
    return Engine(name, f"{name} over HTTP", "openai_http", None, "unknown", {"url": url, **options})
