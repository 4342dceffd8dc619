"""The functions of an encoder layer in numpy, in the precision of their arguments.

float64 serves the reference, float32 calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """Layer normalisation (Ba et al. 2016, arXiv 1607.06450) over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    y: Array = centred / np.sqrt(variance + x.dtype.type(epsilon)) * weight + bias
    return y


# Steps in which INT8 attention counts a weight, from nothing to the largest of its row: all of a uint8.
WEIGHT_LEVELS = 255


def attention(
    query: Array, key: Array, value: Array, num_heads: int, bias: Array | None = None, *, rounded: bool = False
) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762) within texts of one length.

    Args:
        query: (batch, seq_len, hidden).
        key: (batch, seq_len, hidden).
        value: (batch, seq_len, hidden).
        num_heads: Heads that hidden is split into.
        bias: Added to the scores, (heads, seq_len, seq_len); None for nothing.
        rounded: Whether weights are rounded to `WEIGHT_LEVELS`, before they are divided by their sum.

    Returns:
        (batch, seq_len, hidden).
    """
    batch, seq_len, hidden = query.shape

    def split(x: Array) -> Array:
        return x.reshape(batch, seq_len, num_heads, -1).transpose(0, 2, 1, 3)  # (batch, heads, seq_len, head_dim)

    scores = split(query) @ split(key).swapaxes(-1, -2) / query.dtype.type(math.sqrt(hidden // num_heads))
    if bias is not None:
        scores += bias
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    if rounded:
        np.rint(weights * weights.dtype.type(WEIGHT_LEVELS), out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    context: Array = (weights @ split(value)).transpose(0, 2, 1, 3).reshape(query.shape)
    return context


# Farther tokens share a bucket with those at this distance.
FARTHEST = 128


def bias_by_distance(table: Array) -> Array:
    """MPNet's attention bias for each distance between two tokens (Song et al. 2020, arXiv 2004.09297).

    The buckets are T5's (Raffel et al. 2020, arXiv 1910.10683): one for each short distance, logarithmic ones up to
    `FARTHEST`, for either direction apart. Computed in float32 as PyTorch does, so that no distance falls into the
    bucket beside its own (transformers: models/mpnet/modeling_mpnet.py, relative_position_bucket, which takes 32
    buckets whatever the config says).

    Args:
        table: (32 or more buckets, heads).

    Returns:
        (heads, 2 FARTHEST + 1), for key position less query position from -FARTHEST to FARTHEST.
    """
    distance = np.arange(-FARTHEST, FARTHEST + 1)
    n, exact = np.abs(distance), 8
    ratio = np.log(np.maximum(n, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(FARTHEST / exact))
    far = np.minimum(exact + (ratio * np.float32(exact)).astype(np.int64), 2 * exact - 1)
    bias: Array = table[np.where(n < exact, n, far) + 2 * exact * (distance > 0)].T
    return bias


def gelu(x: Array) -> Array:
    """Gaussian error linear unit (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    y: Array = x * (0.5 + 0.5 * erf(x * x.dtype.type(math.sqrt(0.5))))
    return y


def gelu_tanh(x: Array) -> Array:
    """The same paper's approximation by tanh."""
    y: Array = 0.5 * x * (1 + np.tanh(x.dtype.type(math.sqrt(2 / math.pi)) * (x + x.dtype.type(0.044715) * x**3)))
    return y


def sigmoid(x: Array) -> Array:
    """Logistic function, by tanh, which does not overflow."""
    y: Array = 0.5 + 0.5 * np.tanh(0.5 * x)
    return y


# By the names in `architectures.ACTIVATIONS` and `modules.DENSE_ACTIVATIONS`.
FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
}


_ERF_STEP = 1 / 512
_ERF_GRID = np.arange(-6 * 512, 6 * 512 + 1) * _ERF_STEP
_ERF_VALUES = np.array([math.erf(x) for x in _ERF_GRID])
_ERF_SLOPES = 2 / math.sqrt(math.pi) * np.exp(-(_ERF_GRID**2)) * _ERF_STEP


def erf(x: Array) -> Array:
    """Error function; numpy has none, and math.erf takes one number at a time.

    float64: cubic Hermite interpolation of math.erf on a grid of 1/512, error below h^4 / 384 x max |erf''''| = 4e-13.
    float32: linear interpolation, error below h^2 / 8 x max |erf''| = 5e-7. Beyond 6 it is 1 to the last bit.
    """
    place = np.clip((x - x.dtype.type(_ERF_GRID[0])) * x.dtype.type(512), 0, len(_ERF_GRID) - 1)
    i = np.minimum(place.astype(np.int32), len(_ERF_GRID) - 2)
    t = place - i
    if x.dtype == np.float32:
        values = _ERF_VALUES.astype(np.float32)
        y: Array = values[i] + t.astype(np.float32) * np.diff(values)[i]
        return y
    h00, h10 = (1 + 2 * t) * (1 - t) ** 2, t * (1 - t) ** 2
    h01, h11 = t**2 * (3 - 2 * t), t**2 * (t - 1)
    y = h00 * _ERF_VALUES[i] + h10 * _ERF_SLOPES[i]
    y += h01 * _ERF_VALUES[i + 1] + h11 * _ERF_SLOPES[i + 1]
    return y
