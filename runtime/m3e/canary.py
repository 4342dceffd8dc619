"""Golden texts through the real session: does this machine give the vectors that the exporter saw?"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from m3e.errors import InferenceError, StartError
from m3e.manifest import Graph, Manifest, decode_array
from m3e.session import Float32Array
from m3e.tokenizer import Tokenizer
from m3e.vectors import normalize


class Runs(Protocol):
    """A session of any device."""

    def run(self, input_ids: list[list[int]]) -> Float32Array:
        """Run one batch: float32 (batch, dim)."""


def check_canary(manifest: Manifest, graph: Graph, tokenizer: Tokenizer, session: Runs) -> float:
    """Embed the golden texts as one batch and compare with the manifest.

    The exporter embedded them one by one, so this also checks that neighbours and padding do not matter.

    Returns:
        The largest difference between unit vectors.

    Raises:
        StartError: Other token ids, vectors that differ by more than the graph's ``canary_tolerance``, or none at all.
    """
    golden = manifest.golden
    tokens = tokenizer([item.text for item in golden])
    for item, ids in zip(golden, tokens.input_ids, strict=True):
        if list(item.input_ids) != ids:
            raise StartError(
                f"the tokenizer gives other ids for the golden text {item.text!r} than when the bundle was made "
                f"(with tokenizers {manifest.created_with.get('tokenizers')}); install that version, or convert again"
            )
    expected = decode_array(graph.golden_embeddings, (len(golden), manifest.model.embedding_dim))
    try:
        vectors = session.run(tokens.input_ids)
    except InferenceError as error:
        raise StartError(f"{graph.file} gives no vectors for the golden texts on this machine: {error}") from error
    difference = float(np.abs(normalize(vectors) - normalize(expected)).max())
    if not difference <= graph.canary_tolerance:
        raise StartError(
            f"{graph.file} gives other vectors on this machine than when it was made: they differ by {difference:.1e}, "
            f"allowed are {graph.canary_tolerance:.1e}. Choose another precision of this bundle, or convert again on "
            "this kind of machine"
        )
    return difference
