"""Checkpoint -> INT8 sites: calibrate, look at the cosines, and keep more in FP32 if they are low."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from m3e.progress import progress_bar
from m3e.tokenizer import Tokenizer
from m3e_export.calibrate import calibrate
from m3e_export.checkpoint import Checkpoint
from m3e_export.fit import Int8Site
from m3e_export.int8 import quantize_rows
from m3e_export.texts import corpus

# Sites that stay FP32, tried in turn. The input of a feed-forward block's second layer has the heaviest tails and its
# output goes straight into the residual: all-MiniLM-L6-v2 loses half of its error with that site alone.
LADDER: tuple[tuple[str, ...], ...] = ((), ("output",))
# Mean and lowest cosine over the calibration texts at which the next rung is not tried.
GOOD_MEAN, GOOD_MIN = 0.9985, 0.99
# Tokens to calibrate on, and the longest piece of a text: they bound time and memory.
_TOKENS = 24_000
_LONGEST = 128


def quantize(
    checkpoint: Checkpoint,
    texts: Sequence[str] | None = None,
    *,
    max_level: int = 127,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, Int8Site]:
    """Quantise a checkpoint's linear layers, as many as its accuracy bears.

    Args:
        checkpoint: The model.
        texts: Calibration texts; None for the corpus that ships with the exporter.
        max_level: Largest absolute weight level.
        report: Called with a line of text at each step.

    Returns:
        Sites by name; linear layers in none of them stay FP32.
    """
    input_ids = calibration_ids(checkpoint, texts)
    levels, scales = quantize_rows(checkpoint.tensors["embeddings.word_embeddings.weight"])
    sites: dict[str, Int8Site] = {}
    for kept in LADDER:
        report(f"calibrating on {len(input_ids)} texts" + (f", {', '.join(kept)} layers in FP32" if kept else ""))
        with progress_bar(checkpoint.config.num_hidden_layers, "layer") as progress:
            sites, cosines = calibrate(
                checkpoint,
                input_ids,
                levels * scales,
                kept=kept,
                max_level=max_level,
                progress=lambda bar=progress: bar.update(1),  # type: ignore[misc]
            )
        report(f"mean cosine {cosines.mean():.5f}, lowest {cosines.min():.4f}")
        if cosines.mean() >= GOOD_MEAN and cosines.min() >= GOOD_MIN:
            break
    return sites


def calibration_ids(checkpoint: Checkpoint, texts: Sequence[str] | None) -> list[list[int]]:
    """Token ids of as many texts as the budget takes, both languages in turn, long texts cut."""
    if texts is None:
        # Not strict: the budget is spent before either language ends.
        pairs = zip(_spread(corpus("zh")), _spread(corpus("en")), strict=False)
        texts = [text for pair in pairs for text in pair]
    tokens = Tokenizer(checkpoint.tokenizer_json, min(_LONGEST, checkpoint.max_seq_length))(texts)
    return tokens.input_ids[: int(np.searchsorted(np.cumsum(tokens.n_tokens), _TOKENS)) + 1]


def _spread(lines: Sequence[str]) -> list[str]:
    """Reorder so that every prefix holds lines of all registers: the corpus keeps registers together."""
    return [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]
