"""What a graph takes of memory on the CPU, and whether its weights are opened twice."""

from __future__ import annotations

from m3e.errors import InputError
from m3e.manifest import Model
from m3e.plan import MAX_BATCH_TOKENS

# Without a bound, larger weights are opened once.
_TWICE_BYTES = 256 << 20
# Of a layer's activations, (tokens, hidden) and (tokens, intermediate), so many are alive at once in float32.
_HIDDEN_ALIVE, _INTERMEDIATE_ALIVE = 10, 3


def runs_side_by_side(graph_bytes: int, model: Model, num_threads: int, max_memory_mb: int | None) -> bool:
    """Decide whether batches run side by side, which takes the weights twice and a batch's activations for each thread.

    Args:
        graph_bytes: Size of the graph's file.
        model: The model's facts.
        num_threads: Threads of the encoder.
        max_memory_mb: Bound on `session_bytes` in MiB; None for no other than that of the weights' size.

    Raises:
        InputError: Not even one batch at a time fits.
    """
    if max_memory_mb is None:
        return graph_bytes <= _TWICE_BYTES
    least = session_bytes(graph_bytes, model, 1, weights=1)
    if least > max_memory_mb << 20:
        raise InputError(
            f"max_memory_mb is {max_memory_mb}, but this graph takes {-(-least >> 20)} MB with a text of "
            f"{model.max_seq_length} tokens; allow that, or convert with int8 or a smaller --max-seq-length"
        )
    return session_bytes(graph_bytes, model, num_threads, weights=2) <= max_memory_mb << 20


def session_bytes(graph_bytes: int, model: Model, batches: int, *, weights: int) -> int:
    """Predict what opening a graph and running the largest batches adds to a process.

    Args:
        graph_bytes: Size of the graph's file, which is nearly all weights.
        model: The model's facts.
        batches: How many run at once.
        weights: How often they are opened.
    """
    tokens = max(MAX_BATCH_TOKENS, model.max_seq_length)
    alive = tokens * (_HIDDEN_ALIVE * model.hidden_size + _INTERMEDIATE_ALIVE * model.intermediate_size)
    scores = model.num_attention_heads * model.max_seq_length**2
    return weights * graph_bytes + batches * 4 * (alive + scores)
