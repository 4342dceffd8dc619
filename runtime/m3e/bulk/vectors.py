"""The texts of a window -> vectors as they are stored, each different text embedded once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from m3e.encoder import Encoder, TruncationWarning
from m3e.errors import InputError
from m3e.tokenizer import check_texts

VectorType = Literal["float32", "float16", "int8"]
# One character becomes at most 18 by Unicode normalisation (U+FDFA; Unicode Standard Annex 15, table 7).
_MAX_EXPANSION = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorOptions:
    """How texts become stored vectors.

    Attributes:
        precision: Type of the numbers; int8 are 256 steps over the bundle's ranges.
        normalize: Scale vectors to unit length.
        truncate_dim: Keep the first dimensions only.
        prompt_name: The model's prompt to put before every text; None for its default.
    """

    precision: VectorType = "float32"
    normalize: bool = False
    truncate_dim: int | None = None
    prompt_name: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in get_args(VectorType):
            raise InputError(f"precision is {self.precision!r}, expected {', '.join(get_args(VectorType))}")


class VectorSource:
    """An encoder with its options fixed.

    Attributes:
        space: What decides whether two stored vectors may be compared.
    """

    def __init__(self, encoder: Encoder, options: VectorOptions) -> None:
        self.encoder = encoder
        self.options = options
        self._prompt = _prompt(encoder, options.prompt_name)
        self._n_special = int(encoder.count_tokens([""])[0])
        model = encoder.manifest.model
        self.dim = int(self.embed([""])[0].shape[1])  # every option is checked here, before any input is read
        self.space: dict[str, Any] = {
            "space_id": encoder.manifest.space_id,
            "dim": self.dim,
            "normalized": options.normalize
            or (model.normalize and options.truncate_dim in (None, model.embedding_dim)),
            "prompt": self._prompt,
            "precision": options.precision,
        }

    def embed(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Embed texts.

        Returns:
            (n, dim) of the options' type, and bool (n,): which texts were longer than the model reads.

        Raises:
            InputError: A vector does not fit into float16.
        """
        places: dict[str, int] = {}
        inverse = np.array([places.setdefault(text, len(places)) for text in check_texts(texts)], dtype=np.intp)
        different = [self._prompt + text for text in places]
        options = self.options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # told row by row instead
            embeddings = self.encoder.encode(
                list(places),
                prompt=self._prompt,  # not joined here: some models do not pool it
                show_progress_bar=False,
                precision="int8" if options.precision == "int8" else "float32",
                normalize_embeddings=options.normalize,
                truncate_dim=options.truncate_dim,
            )
        if options.precision == "float16":
            with np.errstate(over="ignore"):
                embeddings = embeddings.astype(np.float16)
            if not np.isfinite(embeddings).all():
                raise InputError("a vector has values beyond float16's 65504; normalise the vectors or use float32")
        return embeddings[inverse], self._truncated(different)[inverse]

    def _truncated(self, texts: list[str]) -> npt.NDArray[np.bool_]:
        """Find the texts that were cut; only those that could have been are counted."""
        limit = self.encoder.max_seq_length
        result = np.zeros(len(texts), dtype=np.bool_)
        long = [i for i, text in enumerate(texts) if len(text) * _MAX_EXPANSION > limit - self._n_special]
        if long:
            result[long] = self.encoder.count_tokens([texts[i] for i in long], exact=False) > limit
        return result

    def describe(self) -> dict[str, Any]:
        """What decides every byte of the output apart from the input."""
        manifest = self.encoder.manifest
        graphs = [manifest.files[graph.file].sha256 for graph in manifest.graphs
                  if graph.precision == self.encoder.precision]  # fmt: skip
        return {**asdict(self.options), "graphs": graphs, "max_seq_length": self.encoder.max_seq_length}


def _prompt(encoder: Encoder, name: str | None) -> str:
    name = encoder.manifest.model.default_prompt_name if name is None else name
    if name is not None and name not in encoder.prompts:
        available = ", ".join(map(repr, encoder.prompts)) or "none"
        raise InputError(f"there is no prompt named {name!r}; the bundle has {available}")
    return "" if name is None else encoder.prompts[name]
