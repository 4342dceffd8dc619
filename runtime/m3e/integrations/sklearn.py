"""scikit-learn: texts -> vectors as a step of a pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin

from m3e.encoder import Encoder


class M3EVectorizer(TransformerMixin, BaseEstimator):
    """Embed with a bundle. There is nothing to fit; the bundle is opened when it is first needed.

    Args:
        bundle: Folder written by ``convert.py``.
        normalize: Vectors of unit length.
        precision: Which graph, as for `m3e.Encoder`.
    """

    def __init__(self, bundle: str, normalize: bool = True, precision: str = "auto") -> None:
        self.bundle = bundle
        self.normalize = normalize
        self.precision = precision

    def fit(self, texts: Any, y: Any = None) -> M3EVectorizer:
        """Open the bundle."""
        self.encoder_ = Encoder(self.bundle, precision=self.precision)
        self.n_features_out_ = self.encoder_.get_sentence_embedding_dimension()
        return self

    def transform(self, texts: Any) -> npt.NDArray[np.float32]:
        """Embed a list, array or column of texts: float32 (n, dim)."""
        if not hasattr(self, "encoder_"):
            self.fit(texts)
        return self.encoder_.encode(list(texts), normalize_embeddings=self.normalize)

    def get_feature_names_out(self, input_features: Any = None) -> npt.NDArray[np.object_]:
        """Name the dimensions, for ``set_output``."""
        return np.array([f"m3e{i}" for i in range(self.n_features_out_)], dtype=object)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.requires_fit = False
        return tags
