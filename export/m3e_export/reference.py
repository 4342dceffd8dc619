"""What the vectors should be: PyTorch where it is installed, otherwise the encoder in float64 numpy.

PyTorch reads the checkpoint's folder by itself, with transformers; the other walks through our own tensors.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e_export.checkpoint import Checkpoint
from m3e_export.numpy_steps import NumpySteps
from m3e_export.pooling import embed_sentence
from m3e_export.walk import hidden_states

Float64Array = npt.NDArray[np.float64]
# Word embeddings, first and last hidden states of one text.
States = tuple[Float64Array, Float64Array, Float64Array]


def reference_name() -> str:
    """Name the reference that `reference_embeddings` will use, with its version."""
    if _has_torch():
        import torch
        import transformers

        return f"torch {torch.__version__.split('+')[0]} float32, transformers {transformers.__version__}"
    return f"numpy {np.__version__} float64"


def reference_embeddings(checkpoint: Checkpoint, input_ids: Sequence[Sequence[int]]) -> Iterator[Float64Array]:
    """Embed each text by itself, so that nothing can depend on batching or padding.

    Args:
        checkpoint: The model.
        input_ids: Token ids of each text, special tokens included.

    Yields:
        float64 (dim,) for each text, in order.
    """
    states = _torch_states if _has_torch() else _numpy_states
    for words, first, last in states(checkpoint, input_ids):
        yield embed_sentence(checkpoint, words, first, last)


def numpy_token_embeddings(checkpoint: Checkpoint, input_ids: Sequence[int]) -> Float64Array:
    """Run the encoder on one text: the last layer's output, float64 (n_tokens, hidden)."""
    ((_, _, last),) = _numpy_states(checkpoint, [input_ids])
    return last


def _numpy_states(checkpoint: Checkpoint, input_ids: Sequence[Sequence[int]]) -> Iterator[States]:
    for ids in input_ids:
        steps = NumpySteps(checkpoint, [ids], np.float64)
        words = steps.words()
        first, *_, last = hidden_states(steps, checkpoint.config, words)
        yield words, first, last


def _has_torch() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in ("torch", "transformers"))


def _torch_states(checkpoint: Checkpoint, input_ids: Sequence[Sequence[int]]) -> Iterator[States]:
    import torch
    from transformers import AutoModel

    with _quiet_transformers():
        model: Any = AutoModel.from_pretrained(checkpoint.folder, dtype=torch.float32)
    model.train(False)
    embedding = model.get_input_embeddings()
    with torch.inference_mode():
        for ids in input_ids:
            tokens = torch.tensor([list(ids)])
            output = model(input_ids=tokens, output_hidden_states=True)
            # The last hidden state is not the last of the states where a norm follows the layers.
            values = embedding(tokens), output.hidden_states[0], output.last_hidden_state
            words, first, last = (value[0].double().numpy() for value in values)
            yield words, first, last


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its reports of heads that the checkpoint has and the encoder has not, and its progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
