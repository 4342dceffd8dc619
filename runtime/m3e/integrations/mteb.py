"""mteb: a bundle as a model to evaluate."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from m3e.encoder import Encoder


class M3EModel(AbsEncoder):
    """Give a bundle to ``mteb.evaluate``.

    Args:
        bundle: Folder written by ``convert.py``.
        precision: Which graph; results of each are kept apart.
    """

    def __init__(self, bundle: str | os.PathLike[str], precision: str = "auto") -> None:
        self.model = Encoder(bundle, precision=precision)
        manifest = self.model.manifest
        source = manifest.source.id.replace("/", "__")
        self.mteb_model_meta = ModelMeta(
            loader=None, name=f"m3e-runtime/{source}-{self.model.precision}",
            revision=manifest.source.revision or manifest.space_id, release_date=None,
            languages=["zho-Hans", "eng-Latn"],
            n_parameters=None, memory_usage_mb=None, max_tokens=self.model.max_seq_length,
            embed_dim=self.model.get_sentence_embedding_dimension(), license=None, open_weights=True,
            public_training_code=None, public_training_data=None, framework=["ONNX"],
            similarity_fn_name=ScoringFunction.COSINE, use_instructions=False, training_datasets=None,
        )  # fmt: skip

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None,
        **arguments: Any,
    ) -> npt.NDArray[np.float32]:  # fmt: skip
        """Embed what a task gives: batches with a list of texts under ``text``."""
        texts = [text for batch in inputs for text in batch["text"]]
        if prompt_type is not None and getattr(prompt_type, "value", prompt_type) == "query":
            return self.model.encode_query(texts, show_progress_bar=arguments.get("show_progress_bar"))
        return self.model.encode_document(texts, show_progress_bar=arguments.get("show_progress_bar"))
