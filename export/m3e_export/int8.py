"""INT8 storage of weights, and the nodes that compute with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from m3e_export.builder import CONTRIB, GraphBuilder
from m3e_export.calibrate import Int8Site
from m3e_export.checkpoint import Checkpoint
from m3e_export.graph import Weights

FLOAT = 1  # onnx.TensorProto.FLOAT


class Int8Weights(Weights):
    """Word embeddings as int8 rows, linear layers as int8 weights on uint8 inputs.

    uint8 activations times int8 weights is the product that VNNI computes; bias and scales are in the multiplication's
    epilogue, so nothing but the result is written.

    Args:
        checkpoint: The model.
        sites: What calibration made; linear layers that are in none stay FP32.
    """

    def __init__(self, checkpoint: Checkpoint, sites: Mapping[str, Int8Site]) -> None:
        super().__init__(checkpoint)
        self.sites = fold_divisors(sites)
        self.levels, self.scales = quantize_rows(checkpoint.tensors["embeddings.word_embeddings.weight"])

    def words(self, builder: GraphBuilder, ids: str) -> str:
        """Word embeddings of ids (T,): float32 (T, hidden)."""
        return append_rows(builder, "embeddings.word_embeddings", self.levels, self.scales, ids)

    def linears(self, builder: GraphBuilder, site: str, names: Sequence[str], value: str) -> list[str]:
        """Linear layers that read the same value (T, in): float32 (T, out) each."""
        if site not in self.sites:
            return super().linears(builder, site, names, value)
        outputs = append_site(builder, site, self.sites[site], value)
        return [outputs[f"{site}.{name}"] for name in names]


def append_site(builder: GraphBuilder, name: str, site: Int8Site, value: str) -> dict[str, str]:
    """Append a site's layers on the value that they read, (..., in): float32 (..., out) of each, by its name."""
    if site.divisor is not None:
        value = builder.op("Mul", value, builder.const(f"{name}.smoothing", 1 / site.divisor, np.float32))
    scale = builder.const(f"{name}.scale", site.scale, np.float32)
    zero_point = builder.const(f"{name}.zero_point", site.zero_point, np.uint8)
    levels = builder.op("QuantizeLinear", value, scale, zero_point)
    return {
        full: builder.op(
            "MatMulIntegerToFloat",
            levels,
            builder.const(f"{full}.weight", linear.weight),
            scale,
            builder.const(f"{full}.weight_scale", linear.scale),
            zero_point,
            builder.const(f"{full}.weight_zero_point", np.zeros(len(linear.scale), np.int8)),
            builder.const(f"{full}.bias", linear.bias),
            domain=CONTRIB,
        )
        for full, linear in site.linears.items()
    }


def append_rows(
    builder: GraphBuilder, name: str, levels: npt.NDArray[np.int8], scales: npt.NDArray[np.float32], ids: str
) -> str:
    """Append the look-up of rows that `quantize_rows` has made: float32 (..., dim) of ids (...)."""
    found = builder.op("Gather", builder.const(f"{name}.levels", levels), ids)
    factors = builder.op("Gather", builder.const(f"{name}.scales", scales), ids)
    return builder.op("Mul", builder.op("Cast", found, to=FLOAT), factors)


def quantize_rows(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Quantise each row by its own largest value.

    Args:
        rows: float32 (n, dim).

    Returns:
        Levels, int8 (n, dim), and scales, float32 (n, 1).
    """
    scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / np.float32(127), np.float32(1e-12))
    return np.rint(rows / scales).astype(np.int8), scales


def fold_divisors(sites: Mapping[str, Int8Site]) -> dict[str, Int8Site]:
    """Let the value projection divide what attention's output would be divided by.

    Attention mixes rows and keeps channels apart, so a channel's divisor can go into the scale and bias of the value
    projection's column: nothing is left to do at run time.
    """
    folded = dict(sites)
    for name, site in sites.items():
        source = name.replace(".attention.output", ".attention.self")
        if source == name or site.divisor is None or source not in sites:
            continue
        value = f"{source}.value"
        linear = sites[source].linears[value]
        divided = dataclasses.replace(linear, scale=linear.scale / site.divisor, bias=linear.bias / site.divisor)
        folded[source] = dataclasses.replace(sites[source], linears={**sites[source].linears, value: divided})
        folded[name] = dataclasses.replace(site, divisor=None)
    return folded
