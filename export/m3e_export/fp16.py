"""Which parts of a model FP16 can hold, and a graph builder that keeps the others in FP32.

FP16 ends at 65504 and loses bits below 6e-5. A site, which is a linear layer or a group of them with what leads to the
next normalisation, stays FP32 where its values came near those ends on real texts. The choice is the exporter's and
stands in the manifest; an overflow on a text that is wilder still is refused at run time like every value that is not
finite.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from m3e.feeds import Feeds, rectangle
from m3e.session import import_onnxruntime
from m3e_export.builder import GraphBuilder
from m3e_export.checkpoint import Checkpoint, position_rows
from m3e_export.pooling_graph import PoolingNodes

FLOAT, FLOAT16, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT32
EMBEDDINGS = "embeddings"
# Largest values of a site between which FP16 is trusted. Above: a factor of 8 up to 65504, for texts that calibration
# has not seen. Below: FP16's steps end at 6e-8, a 16000th of this.
LARGEST, SMALLEST = 65504 / 8, 2.0**-10


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the graph and its element type, FLOAT or FLOAT16."""

    name: str
    dtype: int


class HalfBuilder(GraphBuilder):
    """A builder that knows which sites are FP32.

    Args:
        inputs: The graph's inputs by name: element type and shape.
        fp32_sites: Sites that stay FP32; every other is FP16.
    """

    def __init__(self, inputs: Mapping[str, tuple[int, list[int | str]]], fp32_sites: Collection[str]) -> None:
        super().__init__(inputs)
        self._fp32_sites = fp32_sites
        self._casts: dict[tuple[str, int], str] = {}
        self.watched: list[tuple[str, str]] = []

    def dtype(self, site: str) -> int:
        """Element type of a site's values and weights."""
        return FLOAT if site in self._fp32_sites else FLOAT16

    def cast(self, value: Value, dtype: int) -> str:
        """The value in another element type; a cast is made once."""
        if value.dtype == dtype:
            return value.name
        if (value.name, dtype) not in self._casts:
            self._casts[value.name, dtype] = self.op("Cast", value.name, to=dtype)
        return self._casts[value.name, dtype]

    def weight(self, name: str, tensor: npt.NDArray[np.float32], dtype: int) -> str:
        """Add weights in the element type of their site."""
        return self.const(name, tensor, helper.tensor_dtype_to_np_dtype(dtype))

    def watch(self, site: str, *values: str) -> None:
        """Name values that are FP16 when the site is."""
        self.watched += [(site, value) for value in values]


class GpuPoolingNodes(PoolingNodes):
    """Poolings from the tokens of a GPU's graph, in FP32; a subclass brings the tokens to their cells.

    Args:
        builder: The graph.
        rectangle: Any value (batch, seq_len), of int32.
        lengths: Tokens of each text, int32 (batch,).

    Attributes:
        attention_mask: int64 (batch, seq_len), 1 for real tokens.
    """

    def __init__(self, builder: HalfBuilder, rectangle: str, lengths: str) -> None:
        # 1, 2, 3 ... in every row, without a look at the shape; in FP32, because TensorRT adds up no whole numbers.
        ones = builder.op("Cast", builder.op("Equal", rectangle, rectangle), to=FLOAT)
        places = builder.op("CumSum", ones, builder.const("one", 1, np.int64))
        ends = builder.op("Unsqueeze", builder.op("Cast", lengths, to=FLOAT), builder.int64(1))
        inside = builder.op("LessOrEqual", places, ends)
        self.attention_mask = builder.op("Cast", inside, to=onnx.TensorProto.INT64)
        super().__init__(builder, "", mask=self.attention_mask)
        self._place = places

    def _sum(self, tokens: str, weights: str) -> str:
        weighted = self._builder.op(
            "Mul", self._in_cells(tokens), self._builder.op("Unsqueeze", weights, self._builder.int64(2))
        )
        return self._builder.op("ReduceSum", weighted, self._one, keepdims=0)

    def _float(self, value: str) -> str:
        return self._builder.op("Cast", value, to=FLOAT)


def choose_fp32_sites(
    checkpoint: Checkpoint,
    input_ids: Sequence[Sequence[int]],
    build: Callable[[Checkpoint, Collection[str]], tuple[onnx.ModelProto, Sequence[tuple[str, str]]]],
) -> dict[str, float]:
    """Run texts through the FP32 form of a graph and find the sites whose values FP16 cannot hold.

    Args:
        checkpoint: The model.
        input_ids: Token ids of the texts.
        build: Gives the graph with some sites in FP32, and the values to watch: pairs of site and name.

    Returns:
        The sites that must stay FP32, each with its farthest value.
    """
    model, watched = build(checkpoint, sites_of(checkpoint))
    peaks: dict[str, list[float]] = defaultdict(list)
    for site, tensors in _weights_by_site(checkpoint).items():
        peaks[site] += [float(np.abs(tensor).max()) for tensor in tensors]
    found = measure(model, [value for _, value in watched], (rectangle([ids]) for ids in input_ids))
    for (site, _), value in zip(watched, found, strict=True):
        peaks[site].append(value)
    return {site: value for site, values in peaks.items() if (value := beyond(values))}


def beyond(peaks: Collection[float]) -> float:
    """The farthest of some peaks that FP16 cannot hold; zero where it holds all."""
    if max(peaks, default=0) > LARGEST:
        return max(peaks)
    # A value that is zero throughout is held exactly.
    return min((value for value in peaks if 0 < value < SMALLEST), default=0)


def sites_of(checkpoint: Checkpoint) -> list[str]:
    """Names of all sites, in the order of the graph."""
    parts = ("attention.self", "attention.output", "intermediate", "output")
    return [EMBEDDINGS, *(
        f"encoder.layer.{i}.{part}" for i in range(checkpoint.config.num_hidden_layers) for part in parts
    )]  # fmt: skip


def fold_biases(checkpoint: Checkpoint) -> Checkpoint:
    """Take the biases of keys and values out of the model without changing what it computes.

    Softmax does not see what is the same for every key, and its weights add up to one: the bias of the values goes
    through the output projection into that one's bias. Attention is then spared a pass over all of Q, K and V.
    """
    tensors = dict(checkpoint.tensors)
    for i in range(checkpoint.config.num_hidden_layers):
        attention = f"encoder.layer.{i}.attention"
        bias, weight = tensors[f"{attention}.output.dense.bias"], tensors[f"{attention}.output.dense.weight"]
        moved = weight.astype(np.float64) @ tensors[f"{attention}.self.value.bias"].astype(np.float64)
        tensors[f"{attention}.output.dense.bias"] = (bias + moved).astype(np.float32)
        for name in ("key", "value"):
            tensors[f"{attention}.self.{name}.bias"] = np.zeros_like(tensors[f"{attention}.self.{name}.bias"])
    return dataclasses.replace(checkpoint, tensors=tensors)


def _weights_by_site(checkpoint: Checkpoint) -> dict[str, list[npt.NDArray[np.float32]]]:
    words, project = "embeddings.word_embeddings.weight", "embeddings.project.weight"
    weights = {EMBEDDINGS: [checkpoint.tensors[words], position_rows(checkpoint)]}
    if project in checkpoint.tensors:
        weights[EMBEDDINGS].append(checkpoint.tensors[project])
    for site in sites_of(checkpoint)[1:]:
        names = ("query", "key", "value") if site.endswith("self") else ("dense",)
        weights[site] = [checkpoint.tensors[f"{site}.{name}.weight"] for name in names]
    return weights


def measure(model: onnx.ModelProto, values: Sequence[str], batches: Iterable[Feeds]) -> list[float]:
    """Largest absolute value of each value of a graph over batches; infinite where one was not finite."""
    names = []
    for i, value in enumerate(values):
        model.graph.node.append(helper.make_node("Abs", [value], [f"abs_{i}"]))
        model.graph.node.append(helper.make_node("ReduceMax", [f"abs_{i}"], [f"peak_{i}"], keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info(f"peak_{i}", FLOAT, []))
        names.append(f"peak_{i}")
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    peaks = np.zeros(len(names))
    for feeds in batches:
        peaks = np.maximum(peaks, [float(np.nan_to_num(peak, nan=np.inf)) for peak in session.run(names, feeds)])
    return [float(peak) for peak in peaks]
