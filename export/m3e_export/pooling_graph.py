"""Tokens -> a batch's vectors as nodes of a graph, in FP32.

`pooling` does the same in numpy. Every node keeps the texts apart: a vector is bit for bit the same in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from m3e_export.builder import GraphBuilder
from m3e_export.modules import DENSE_ACTIVATIONS, Dense, Normalize
from m3e_export.pooling import AVERAGED

# Functions of `encoder_math.FUNCTIONS` that are one ONNX operator.
_OPERATORS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}


class PoolingNodes:
    """The poolings of one graph; what several of them need is computed once.

    Args:
        builder: The graph.
        cell_index: int64 (batch, seq_len), the packed token that stands in each cell of the rectangle.
        mask: int64 (batch, seq_len), 1 for real tokens.
        include_prompt: Whether prompts are pooled too; if not, the graph gets an input ``prompt_length``, int64 (1,),
            zero unless given: that many tokens of each text are left out.
    """

    def __init__(
        self, builder: GraphBuilder, cell_index: str, *, mask: str = "attention_mask", include_prompt: bool = True
    ) -> None:
        self._builder = builder
        self._cell_index = cell_index
        self._one = builder.int64(1)
        self._cells: dict[str, str] = {}
        self._means: dict[str, str] = {}
        # Which tokens count, and each token's place in its text, from 1 on.
        self._all = self._mask = mask
        self._place = ""
        if not include_prompt:
            behind = builder.op("Greater", self._places(), builder.optional_input("prompt_length", 0))
            self._mask = builder.op("Mul", mask, builder.op("Cast", behind, to=onnx.TensorProto.INT64))
        self._float_mask = builder.op("Cast", self._mask, to=onnx.TensorProto.FLOAT)

    def pool(self, poolings: Sequence[str], words: str, first: str, last: str) -> str:
        """Pool tokens: (batch, len(poolings) x hidden).

        Args:
            poolings: Names, concatenated in this order.
            words: Word embeddings, (T, embedding_size).
            first: The embeddings, normalised, (T, hidden).
            last: The last layer's output, (T, hidden).
        """
        others = {name: {"first": first, "words": words}[source] for name, source in AVERAGED.items()}
        parts = [
            self._average(others[name], last) if name in others else getattr(self, f"_{name}")(last)
            for name in poolings
        ]
        return parts[0] if len(parts) == 1 else self._builder.op("Concat", *parts, axis=1)

    def _average(self, other: str, last: str) -> str:
        total = self._builder.op("Add", self._mean(other), self._mean(last))
        return self._builder.op("Mul", total, self._builder.const("half", 0.5, np.float32))

    def _cls(self, tokens: str) -> str:
        """The first token that counts."""
        return self._token(tokens, self._builder.op("ArgMax", self._int32_mask(), axis=1))

    def _lasttoken(self, tokens: str) -> str:
        """The last token that counts."""
        return self._token(tokens, self._builder.op("ArgMax", self._int32_mask(), axis=1, select_last_index=1))

    def _max(self, tokens: str) -> str:
        builder = self._builder
        counts = builder.op("Cast", builder.op("Unsqueeze", self._mask, builder.int64(2)), to=onnx.TensorProto.BOOL)
        lowest = builder.const("minus_infinity", -np.inf, np.float32)
        return builder.op(
            "ReduceMax", builder.op("Where", counts, self._in_cells(tokens), lowest), self._one, keepdims=0
        )

    def _mean(self, tokens: str) -> str:
        """Mean of the tokens that count; a text without any gives zeros."""
        if tokens not in self._means:
            self._means[tokens] = self._builder.op("Div", self._sum(tokens, self._float_mask), self._length())
        return self._means[tokens]

    def _mean_sqrt_len_tokens(self, tokens: str) -> str:
        total = self._sum(tokens, self._float_mask)
        return self._builder.op("Div", total, self._builder.op("Sqrt", self._length()))

    def _weightedmean(self, tokens: str) -> str:
        """Mean weighted by the place in the text, which a prompt that does not count still takes up."""
        builder = self._builder
        weights = builder.op("Mul", builder.op("Cast", self._places(), to=onnx.TensorProto.FLOAT), self._float_mask)
        return builder.op("Div", self._sum(tokens, weights), self._at_least_one(weights))

    def _sum(self, tokens: str, weights: str) -> str:
        """Weighted sum over each text's tokens: (batch, width).

        A product with the weights, text by text: onnxruntime's ReduceSum adds in another order for one text than for
        many.
        """
        rows = self._builder.op("Unsqueeze", weights, self._one)
        return self._builder.op("Squeeze", self._builder.op("MatMul", rows, self._in_cells(tokens)), self._one)

    def _length(self) -> str:
        return self._at_least_one(self._float_mask)

    def _at_least_one(self, weights: str) -> str:
        """Sums of whole numbers, which are exact in any order: (batch, 1)."""
        total = self._builder.op("ReduceSum", weights, self._one, keepdims=1)
        return self._builder.op("Max", total, self._builder.const("one_float", 1, np.float32))

    def _places(self) -> str:
        if not self._place:
            self._place = self._builder.op("CumSum", self._all, self._builder.const("one", 1, np.int64))
        return self._place

    def _int32_mask(self) -> str:
        return self._builder.op("Cast", self._mask, to=onnx.TensorProto.INT32)

    def _token(self, tokens: str, column: str) -> str:
        """One token of each text: (batch, width); ``column`` is int64 (batch, 1)."""
        index = self._builder.op("GatherElements", self._cell_index, column, axis=1)
        return self._builder.op("Gather", tokens, self._builder.op("Squeeze", index, self._one))

    def _in_cells(self, tokens: str) -> str:
        if tokens not in self._cells:
            self._cells[tokens] = self._builder.op("Gather", tokens, self._cell_index)
        return self._cells[tokens]


def append_head(builder: GraphBuilder, head: Sequence[Dense | Normalize], vectors: str) -> str:
    """Append dense layers and normalisations: (batch, dim) -> (batch, dim)."""
    for i, module in enumerate(head):
        if isinstance(module, Normalize):
            norm = builder.op("ReduceL2", vectors, builder.int64(1), keepdims=1)
            # The bound is torch.nn.functional.normalize's.
            bound = builder.const("norm_bound", 1e-12, np.float32)
            vectors = builder.op("Div", vectors, builder.op("Max", norm, bound))
        else:
            weights = [builder.const(f"head.{i}.weight", module.weight.T)]  # (in, out)
            if module.bias is not None:
                weights.append(builder.const(f"head.{i}.bias", module.bias))
            vectors = append_function(
                builder, DENSE_ACTIVATIONS[module.activation], builder.op("Gemm", vectors, *weights)
            )
    return vectors


def append_function(builder: GraphBuilder, function: str, x: str) -> str:
    """Append a function of `encoder_math.FUNCTIONS`."""
    if function in ("gelu", "gelu_tanh"):
        return builder.op("Gelu", x, approximate="none" if function == "gelu" else "tanh")
    if function == "silu":
        return builder.op("Mul", x, builder.op("Sigmoid", x))
    return builder.op(_OPERATORS[function], x) if function in _OPERATORS else x
