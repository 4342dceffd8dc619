"""FP32 weights + text -> INT8 weights and static activation scales, layer by layer.

Two streams of activations run side by side through the layers: the exact one, and the one that the quantised layers
before have made of the same texts. Each site (a quantised input and the linear layers that read it) is fitted so that
its outputs on the second stream come close to its outputs on the first. So a site also makes good what its
predecessors lost, and only one layer's activations are in memory at a time.

For each site:

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
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from m3e_export.checkpoint import Checkpoint
from m3e_export.numpy_steps import NumpySteps
from m3e_export.pooling import embed_sentence
from m3e_export.walk import hidden_states

Float32Array = npt.NDArray[np.float32]
Streams = tuple[Float32Array, Float32Array]  # exact and quantised, (T, width) each

# 0, no smoothing, comes first: the others cost a multiplication of the input at run time, and are worth it where they
# leave this share of the noise. A wide input, that of the feed-forward block's second layer, costs the most.
ALPHAS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_WORTH_A_MULTIPLICATION, _WORTH_A_WIDE_MULTIPLICATION = 0.8, 0.45
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
class Int8Site:
    """A quantised input and the layers that read it.

    Attributes:
        linears: The layers by name.
        divisor: float32 (in,), what each channel is divided by before it is quantised; None for nothing.
        scale: Step of the quantised input.
        zero_point: uint8 level of zero.
        alpha: The smoothing that was chosen.
        relative_error: What rounding adds to the output, relative to the output's variation.
    """

    linears: dict[str, Int8Linear]
    divisor: Float32Array | None
    scale: float
    zero_point: int
    alpha: float
    relative_error: float

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


def calibrate(
    checkpoint: Checkpoint,
    input_ids: Sequence[Sequence[int]],
    embeddings: Float32Array,
    *,
    kept: Sequence[str] = (),
    max_level: int = 127,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Int8Site], Float32Array]:
    """Quantise the linear layers of a checkpoint.

    Args:
        checkpoint: The model.
        input_ids: Token ids of the calibration texts.
        embeddings: Word embeddings (vocab, hidden) as the quantised graph will have them.
        kept: Sites that stay FP32, by the part of their name behind the layer, such as ``output``.
        max_level: Largest absolute weight level: 127, or 63 for processors whose 8-bit products saturate.
        progress: Called after each layer.

    Returns:
        Sites by name, such as ``encoder.layer.0.attention.self``; and the cosine of each text's vector, quantised
        against exact, float32 (n,).
    """
    texts = sorted(input_ids, key=len)  # equal lengths attend together
    steps = CalibrationSteps(checkpoint, texts, embeddings, kept, max_level)
    words = steps.words()
    states = hidden_states(steps, checkpoint.config, words)
    first = last = next(states)
    for state in states:
        last = state
        progress()
    ends = np.cumsum([len(ids) for ids in texts])[:-1]
    units = []
    for stream in zip(words, first, last, strict=True):
        by_text = zip(*(np.split(value, ends) for value in stream), strict=True)
        vectors = np.stack([embed_sentence(checkpoint, *values) for values in by_text])
        units.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return steps.sites, (units[0] * units[1]).sum(axis=1)


class CalibrationSteps:
    """The steps of `walk` on both streams; a linear layer is fitted when it is reached.

    Args:
        checkpoint: The model.
        texts: Token ids of texts, sorted by length.
        embeddings: Word embeddings (vocab, embedding_size) of the quantised stream.
        kept: Sites that stay FP32, by the part of their name behind the layer.
        max_level: Largest absolute weight level.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: Sequence[Sequence[int]],
        embeddings: Float32Array,
        kept: Sequence[str],
        max_level: int,
    ) -> None:
        self.sites: dict[str, Int8Site] = {}
        self._exact = NumpySteps(checkpoint, texts, np.float32)
        self._embeddings = embeddings
        self._ids = np.concatenate([np.asarray(text) for text in texts])
        self._kept = kept
        self._max_level = max_level

    def scope(self, name: str) -> None:
        """Nothing to name here."""

    def words(self) -> Streams:
        """Word embeddings, as they are and quantised."""
        return self._exact.words(), self._embeddings[self._ids]

    def positions(self) -> Streams:
        """What is added to the word embeddings; it is not quantised."""
        rows = self._exact.positions()
        return rows, rows

    def linears(self, site: str, names: Sequence[str], x: Streams) -> list[Streams]:
        """Fit a site's layers on the quantised stream, unless they are kept, and apply them."""
        targets = self._exact.linears(site, names, x[0])
        # ELECTRA's projection of the embeddings is a small share of the work, and all layers inherit its error.
        if not site.startswith("encoder.layer.") or site.split(".", 3)[3] in self._kept:
            return list(zip(targets, self._exact.linears(site, names, x[1]), strict=True))
        full = [f"{site}.{name}" for name in names]
        weights = [self._exact.tensor(f"{name}.weight").T for name in full]
        fitted = self.sites[site] = fit_site(full, weights, targets, x[1], self._max_level)
        levels = fitted.quantize(x[1])
        return [(target, fitted.apply(name, levels)) for target, name in zip(targets, full, strict=True)]

    def layer_norm(self, name: str, x: Streams) -> Streams:
        """Layer normalisation."""
        return self._exact.layer_norm(name, x[0]), self._exact.layer_norm(name, x[1])

    def add(self, a: Streams, b: Streams) -> Streams:
        """Sum."""
        return a[0] + b[0], a[1] + b[1]

    def attention(self, query: Streams, key: Streams, value: Streams) -> Streams:
        """Attention within each text."""
        return (
            self._exact.attention(query[0], key[0], value[0]),
            self._exact.attention(query[1], key[1], value[1]),
        )

    def activation(self, x: Streams) -> Streams:
        """The feed-forward block's activation."""
        return self._exact.activation(x[0]), self._exact.activation(x[1])


def fit_site(
    names: Sequence[str],
    weights: Sequence[Float32Array],
    targets: Sequence[Float32Array],
    x: Float32Array,
    max_level: int,
) -> Int8Site:
    """Quantise the layers that read one input.

    Args:
        names: Of the layers.
        weights: float32 (in, out) each.
        targets: What the layers should give for each row of x, float32 (n, out) each.
        x: The input as it will be at run time, float32 (n, in).
        max_level: Largest absolute weight level.
    """
    weight, target = np.concatenate(weights, axis=1), np.concatenate(targets, axis=1)
    site = _smooth(x, weight, max_level)
    smoothed = weight if site.divisor is None else weight * site.divisor[:, None]
    levels = site.quantize(x) * np.float32(site.scale)
    integers, scale = round_weights(smoothed, levels, target, max_level)
    output = levels @ (integers * scale)
    bias = (target - output).mean(axis=0)
    sample = slice(None, None, 8)
    noise = output[sample] - x[sample] @ weight
    error = np.sqrt(noise.var(axis=0).mean() / target.var(axis=0).mean())
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
        smallest = min(0.0, float((low / divisor).min()) * WIDENING)
        largest = max(0.0, float((high / divisor).max()) * WIDENING)
        scale = max((largest - smallest) / 255, 1e-12)
        columns = np.abs(weight * divisor[:, None]).max(axis=0) / max_level
        noise = scale**2 * np.square(divisor) @ row_square
        noise += _ROUNDING_GAIN * np.square(columns).sum() * (mean_square / np.square(divisor)).sum()
        if best is None or noise < best[0] * (1 if best[1].divisor is not None else worth):
            site = Int8Site({}, divisor if alpha else None, scale, round(-smallest / scale), alpha, 0.0)
            best = float(noise), site
    assert best is not None
    return best[1]


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
