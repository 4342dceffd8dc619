"""The way through an encoder, written once.

Whoever walks it brings the steps: the graphs append nodes (`graph`, `graph_cuda`, `graph_tensorrt`), the reference
computes in numpy (`numpy_steps`), calibration does it twice, exactly and quantised (`calibrate`). Layers and tensors
have BERT's names, whatever the architecture (`architectures`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from m3e_export.architectures import EncoderConfig

Value = TypeVar("Value")

# The linear layers of an attention site.
PROJECTIONS = ("query", "key", "value")


class Steps(Protocol[Value]):
    """What an encoder is made of.

    Values are tokens laid end to end, (T, width); in the graph for TensorRT, (batch, seq_len, width).
    """

    def scope(self, name: str) -> None:
        """Say which part of the encoder the next steps belong to."""

    def words(self) -> Value:
        """Look up the word embeddings: (T, embedding_size)."""

    def positions(self) -> Value:
        """Look up what is added to the word embeddings: position, and row 0 of the type tables: (T, embedding_size)."""

    def linears(self, site: str, names: Sequence[str], x: Value) -> list[Value]:
        """Apply the linear layers ``site.name`` to one input."""

    def layer_norm(self, name: str, x: Value) -> Value:
        """Normalise over the last axis."""

    def add(self, a: Value, b: Value) -> Value:
        """Add two values of one shape."""

    def attention(self, site: str, x: Value) -> Value:
        """Attend within each text: the site's `PROJECTIONS` of x, with the architecture's bias if it has one."""

    def activation(self, x: Value) -> Value:
        """Apply the feed-forward block's activation."""


def hidden_states(steps: Steps[Value], config: EncoderConfig, words: Value) -> Iterator[Value]:
    """Walk through an encoder with the norms behind each block.

    Args:
        steps: How each step is done.
        config: The encoder.
        words: The word embeddings, as ``steps.words()`` gives them.

    Yields:
        The embeddings, then each layer's output, each (T, hidden_size).
    """
    steps.scope("embeddings")
    x = steps.layer_norm("embeddings.LayerNorm", steps.add(words, steps.positions()))
    if config.embedding_size != config.hidden_size:
        (x,) = steps.linears("embeddings", ("project",), x)
    yield x
    for i in range(config.num_hidden_layers):
        steps.scope(f"layer_{i}")
        x = _layer(steps, f"encoder.layer.{i}", x)
        yield x


def _layer(steps: Steps[Value], layer: str, x: Value) -> Value:
    context = steps.attention(f"{layer}.attention.self", x)
    (attended,) = steps.linears(f"{layer}.attention.output", ("dense",), context)
    x = steps.layer_norm(f"{layer}.attention.output.LayerNorm", steps.add(attended, x))
    (inner,) = steps.linears(f"{layer}.intermediate", ("dense",), x)
    (outer,) = steps.linears(f"{layer}.output", ("dense",), steps.activation(inner))
    return steps.layer_norm(f"{layer}.output.LayerNorm", steps.add(outer, x))
