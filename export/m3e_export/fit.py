"""One site -> INT8: a quantised input and the linear layers that read it, fitted to texts.

1. Smoothing (Xiao et al. 2022, SmoothQuant, arXiv 2211.10438): channel j of the input is divided by
   max|x_j|^alpha / max|w_j|^(1 - alpha), its weight row multiplied by the same. Alpha is chosen by the output error
   that is to be expected.
2. The activation's scale and zero point cover the whole range that was seen, widened, in 256 steps.
3. Weights, one scale per output channel, are rounded one input channel at a time, each rounding error spread over the
   channels still to come (Frantar et al. 2022, GPTQ, arXiv 2210.17323), starting from the least-squares fit.
4. The bias takes up the mean of what is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

# 0, no smoothing, comes first: the others cost a multiplication of the input at run time, and are worth it where they
# leave this share of the noise. A wide input, that of the feed-forward block's second layer, costs the most.
ALPHAS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_WORTH_A_MULTIPLICATION, _WORTH_A_WIDE_MULTIPLICATION = 0.8, 0.45
_LARGEST_LEVEL = 127
# What spreading rounding errors leaves of their variance.
_ROUNDING_GAIN = 0.4
# Texts that calibration never saw reach beyond its extremes; larger steps keep their worst cosines up.
WIDENING = 1.15
# Ridge of the least-squares fit, relative to the mean diagonal: few texts must not bend the weights far. With 0.01 the
# loss on texts that calibration had not seen was four times as large on one of two trained models.
_RIDGE = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Int8Linear:
    """A linear layer: int8 weight (in, out), float32 scale (out,), float32 bias (out,)."""

    weight: npt.NDArray[np.int8]
    scale: Float32Array
    bias: Float32Array


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionSteps:
    """The steps in which attention reads query, key and value: float32 (hidden,) each, whole numbers of at most 127.

    A query's step times the key's is the same in every channel, so one factor turns a sum of whole numbers into a
    score. Otherwise channels are independent, and the layers that make them take the division up.
    """

    query: Float32Array
    key: Float32Array
    value: Float32Array

    def round(self, query: Float32Array, key: Float32Array, value: Float32Array) -> list[Float32Array]:
        """Round float32 (n, hidden) each to whole steps."""
        parts = ((query, self.query), (key, self.key), (value, self.value))
        return [np.clip(np.rint(part / step), -_LARGEST_LEVEL, _LARGEST_LEVEL) * step for part, step in parts]


@dataclasses.dataclass(frozen=True, slots=True)
class Int8Site:
    """A quantised input and the layers that read it.

    Attributes:
        linears: The layers by name.
        divisor: float32 (in,), what each channel is divided by before it is quantised; None for nothing.
        scale: Step of the quantised input.
        zero_point: uint8 level of zero.
        alpha: The smoothing that was chosen.
        relative_error: What rounding adds to the output, relative to the output's variation.
        attention: How attention rounds the outputs; None where they stay float32.
    """

    linears: dict[str, Int8Linear]
    divisor: Float32Array | None
    scale: float
    zero_point: int
    alpha: float
    relative_error: float
    attention: AttentionSteps | None = None

    def quantize(self, x: Float32Array) -> Float32Array:
        """Round a float32 (n, in) input to this site's levels, as float32 levels less the zero point."""
        scaled = x if self.divisor is None else x / self.divisor
        levels: Float32Array = scaled * np.float32(1 / self.scale)
        np.rint(levels, out=levels)
        return np.clip(levels, -self.zero_point, 255 - self.zero_point, out=levels)

    def apply(self, name: str, levels: Float32Array) -> Float32Array:
        """Compute a layer's output from quantised levels."""
        linear = self.linears[name]
        return (levels @ linear.weight.astype(np.float32)) * (linear.scale * np.float32(self.scale)) + linear.bias


def fit_site(
    names: Sequence[str],
    weights: Sequence[Float32Array],
    targets: Sequence[Float32Array],
    x: Float32Array,
    max_level: int,
    divisor: Float32Array | None = None,
) -> Int8Site:
    """Quantise the layers that read one input.

    Args:
        names: Of the layers.
        weights: float32 (in, out) each.
        targets: What the layers should give for each row of x, float32 (n, out) each.
        x: The input as it will be at run time, float32 (n, in).
        max_level: Largest absolute weight level.
        divisor: What the input arrives divided by, float32 (in,); None for nothing, then smoothing is chosen.
    """
    weight, target = np.concatenate(weights, axis=1), np.concatenate(targets, axis=1)
    low, high = x.min(axis=0), x.max(axis=0)
    site = _smooth(x, weight, max_level) if divisor is None else _cover(low, high, divisor, 1.0)
    smoothed = weight if site.divisor is None else weight * site.divisor[:, None]
    levels = site.quantize(x) * np.float32(site.scale)
    integers, scale = round_weights(smoothed, levels, target, max_level)
    output = levels @ (integers * scale)
    bias = (target - output).mean(axis=0)
    sample = slice(None, None, 8)
    noise = output[sample] - x[sample] @ weight
    error = np.sqrt(noise.var(axis=0).mean() / max(target.var(axis=0).mean(), np.finfo(np.float32).tiny))
    ends = np.cumsum([part.shape[1] for part in weights])[:-1]
    linears = {
        name: Int8Linear(w.astype(np.int8), s, b)
        for name, w, s, b in zip(
            names, np.split(integers, ends, axis=1), np.split(scale, ends), np.split(bias, ends), strict=True
        )
    }
    return dataclasses.replace(site, linears=linears, relative_error=float(error))


def _smooth(x: Float32Array, weight: Float32Array, max_level: int) -> Int8Site:
    """Choose alpha by the noise that rounding is expected to add to the output.

    Rounding to steps of d adds d^2 / 12 to the variance. For inputs, channel j's steps are divisor_j x scale and reach
    the output through weight row j; for weights, column n's steps reach it through the mean square of the inputs.
    """
    low, high, mean_square = x.min(axis=0), x.max(axis=0), np.square(x).mean(axis=0)
    x_max = np.maximum(np.maximum(-low, high), 1e-5)
    w_max = np.maximum(np.abs(weight).max(axis=1), 1e-5)
    row_square = np.square(weight).sum(axis=1)
    worth = _WORTH_A_MULTIPLICATION if len(weight) <= weight.shape[1] else _WORTH_A_WIDE_MULTIPLICATION
    best: tuple[float, Int8Site] | None = None
    for alpha in ALPHAS:
        divisor = x_max**alpha / w_max ** (1 - alpha) if alpha else np.ones_like(x_max)
        divisor = (divisor / np.exp(np.log(divisor).mean())).astype(np.float32)
        site = _cover(low, high, divisor if alpha else None, alpha)
        columns = np.abs(weight * divisor[:, None]).max(axis=0) / max_level
        noise = site.scale**2 * np.square(divisor) @ row_square
        noise += _ROUNDING_GAIN * np.square(columns).sum() * (mean_square / np.square(divisor)).sum()
        if best is None or noise < best[0] * (1 if best[1].divisor is not None else worth):
            best = float(noise), site
    assert best is not None
    return best[1]


def _cover(low: Float32Array, high: Float32Array, divisor: Float32Array | None, alpha: float) -> Int8Site:
    """A site, as yet without layers, whose levels cover each channel's range and a little more."""
    divided = (low, high) if divisor is None else (low / divisor, high / divisor)
    smallest = min(0.0, float(divided[0].min()) * WIDENING)
    largest = max(0.0, float(divided[1].max()) * WIDENING)
    scale = max((largest - smallest) / 255, 1e-12)
    return Int8Site({}, divisor, scale, round(-smallest / scale), alpha, 0.0)


def centre(site: Int8Site, name: str, output: Float32Array) -> tuple[Int8Site, Float32Array]:
    """Move a layer's bias so that each channel of its outputs, float32 (n, out), reaches as far up as down.

    What all keys have in common adds the same to a query's scores, which changes no weight. What all values have in
    common comes out of attention as it went in, and the bias of the layer behind it takes it up when that is fitted.
    """
    middle = (output.min(axis=0) + output.max(axis=0)) / 2
    moved = dataclasses.replace(site.linears[name], bias=site.linears[name].bias - middle)
    return dataclasses.replace(site, linears={**site.linears, name: moved}), output - middle


def fit_attention(query: Float32Array, key: Float32Array, value: Float32Array) -> AttentionSteps:
    """Choose the steps of query, key and value, float32 (n, hidden) each, so that they cover what was seen, widened.

    A channel's weight in the scores is its query times its key, so either can be made larger at the other's cost: each
    takes the same share of its range, and the channel with the largest product sets the steps of all.
    """
    reach = [np.abs(part).max(axis=0) * np.float32(WIDENING / _LARGEST_LEVEL) for part in (query, key, value)]
    q, k, v = (np.maximum(part, part.max() * np.float32(1e-4) + np.float32(1e-12)) for part in reach)
    common, ratio = np.sqrt((q * k).max()), np.sqrt(q / k)
    return AttentionSteps(common * ratio, common / ratio, v)


def round_weights(
    weight: Float32Array, x: Float32Array, target: Float32Array, max_level: int
) -> tuple[Float32Array, Float32Array]:
    """Round weights (in, out) to levels so that x @ rounded comes close to target, up to a bias.

    Args:
        weight: float32 (in, out).
        x: The quantised input, float32 (n, in).
        target: float32 (n, out).
        max_level: Largest absolute level.

    Returns:
        Whole levels as float32 (in, out), and the scale of each column, float32 (out,).
    """
    n = len(x)
    mean_x, mean_y = x.mean(axis=0), target.mean(axis=0)
    gram = (x.T @ x / n - np.outer(mean_x, mean_x)).astype(np.float64)
    cross = (x.T @ target / n - np.outer(mean_x, mean_y)).astype(np.float64)
    ridge = _RIDGE * np.diag(gram).mean() + 1e-12
    gram[np.diag_indices_from(gram)] += ridge
    # Least squares, pulled towards the given weights by the ridge.
    fitted = np.linalg.solve(gram, cross + ridge * weight)
    scale = np.maximum(np.abs(fitted).max(axis=0) / max_level, 1e-12)
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    remaining, levels = fitted.copy(), np.empty_like(fitted)
    block = 64
    for start in range(0, len(weight), block):
        stop = min(start + block, len(weight))
        errors = np.empty((stop - start, weight.shape[1]))
        for k in range(start, stop):
            levels[k] = np.clip(np.rint(remaining[k] / scale), -max_level, max_level)
            errors[k - start] = (remaining[k] - levels[k] * scale) / upper[k, k]
            remaining[k + 1 : stop] -= np.outer(upper[k, k + 1 : stop], errors[k - start])
        remaining[stop:] -= upper[start:stop, stop:].T @ errors
    return levels.astype(np.float32), scale.astype(np.float32)
