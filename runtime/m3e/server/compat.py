"""What ``--compat m3e-large-api`` adds: the 1536 dimensions of the 2023 script behind FastGPT.

That script pads shorter vectors with the products of degree two, in the order of scikit-learn's
``PolynomialFeatures(degree=2)``: 1, x1 .. xn, x1*x1, x1*x2 .. xn*xn, cut at 1536, then scales to unit length.
Collections made with it hold such vectors, and these are comparable with them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

DIM = 1536
PORT = 6008
# The key that the script's documentation uses, so that it works unset; it is public, hence no secret.
DEFAULT_KEY = "sk-aaabbbcccdddeeefffggghhhiiijjjkkk"


def expand(vectors: Float32Array, dim: int = DIM) -> Float32Array:
    """Widen vectors (n, d) to (n, dim), not scaled; wide enough ones stay as they are, cut to dim."""
    n, width = vectors.shape
    if width >= dim:
        return vectors[:, :dim]
    parts = [np.ones((n, 1), dtype=np.float32), vectors]
    have = 1 + width
    for i in range(width):
        if have >= dim:
            break
        parts.append(vectors[:, i : i + 1] * vectors[:, i:])
        have += width - i
    wide = np.concatenate(parts, axis=1)[:, :dim]
    return np.pad(wide, ((0, 0), (0, dim - wide.shape[1])))
