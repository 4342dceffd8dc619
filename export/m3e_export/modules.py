"""What stands behind the encoder: poolings, dense layers, normalisation. Read, never guessed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.errors import CheckpointError
from m3e_export.files import read_json
from m3e_export.weights import find_weights, read_tensors

# Keys of the older 1_Pooling/config.json -> names of the newer one, in the order in which their vectors are
# concatenated (huggingface/sentence-transformers: sentence_transformer/modules/pooling.py).
LEGACY_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# uniem's strategies (uniem 0.3.3: uniem/model.py, PoolingStrategy and the UniemEmbedder classes). The last two pool
# more than the last layer and have no name in sentence-transformers.
UNIEM_POOLINGS = {
    "last_mean": "mean",
    "cls": "cls",
    "last_weighted": "weightedmean",
    "first_last_mean": "first_last_mean",
    "embedding_last_mean": "embedding_last_mean",
}
# torch.nn modules that Dense may name -> the function.
DENSE_ACTIVATIONS = {
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}
# Modules of sentence-transformers that make something else than a vector of a text.
_OTHERS = {
    "CLIPModel": "it embeds images too",
    "MLMTransformer": "its vectors are sparse",
    "SpladePooling": "its vectors are sparse",
    "SparseAutoEncoder": "its vectors are sparse",
    "SparseStaticEmbedding": "its vectors are sparse",
    "StaticEmbedding": "it is a table of words, which needs no graph",
    "WordEmbeddings": "it is a table of words, which needs no graph",
}
# Makers whose checkpoints come without a pooling file and that pool by the mean when they use them: uniem for M3E, and
# text2vec (shibing624/text2vec: text2vec/sentence_model.py, encoder_type=EncoderType.MEAN).
_MEAN_BY_NAME = ("m3e", "text2vec")


@dataclasses.dataclass(frozen=True, slots=True)
class Dense:
    """sentence-transformers' Dense: float32 weight (out, in), bias (out,) or None, activation by its torch.nn name."""

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None
    activation: str

    def to_config(self) -> dict[str, Any]:
        """Its ``config.json`` as sentence-transformers writes it."""
        return {
            "in_features": self.weight.shape[1],
            "out_features": self.weight.shape[0],
            "bias": self.bias is not None,
            "activation_function": f"torch.nn.{self.activation}",
        }

    def to_tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """Its weights by sentence-transformers' names."""
        return {"linear.weight": self.weight} | ({} if self.bias is None else {"linear.bias": self.bias})

    def fingerprint(self) -> str:
        """Hash what it computes."""
        digest = hashlib.sha256(self.activation.encode())
        for part in (self.weight, self.bias):
            digest.update(b"" if part is None else part.tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class Normalize:
    """sentence-transformers' Normalize: unit length (torch.nn.functional.normalize)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Modules:
    """The way from tokens to a vector.

    Attributes:
        pooling: Names of the poolings, concatenated in this order.
        include_prompt: Whether a prompt's tokens are pooled too.
        head: What follows the pooling, in order.
    """

    pooling: tuple[str, ...]
    include_prompt: bool = True
    head: tuple[Dense | Normalize, ...] = ()


def encoder_folder(folder: Path) -> Path:
    """Find the encoder of a checkpoint: in the folder itself, or in one below that ``modules.json`` names.

    Raises:
        CheckpointError: ``modules.json`` is damaged, or lists modules that are not built here; or it is an adapter.
    """
    entries = _read_entries(folder)
    encoder = folder / entries[0][1] if entries else folder
    if (encoder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{str(encoder)!r} holds an adapter (adapter_config.json). Merge it into its model first: with peft, "
            "model.merge_and_unload() and then save_pretrained"
        )
    return encoder


def read_modules(folder: Path, name: str) -> Modules:
    """Read the modules around the encoder.

    ``modules.json`` comes first, as sentence-transformers reads it: uniem's entry stays in the ``config.json`` of what
    was trained on with sentence-transformers.

    Args:
        folder: The checkpoint's folder.
        name: Hub id or folder name; where nothing is recorded, names of makers that always pool by the mean count.

    Raises:
        CheckpointError: No pooling is recorded, or modules that are not built here.
    """
    entries = _read_entries(folder)
    if entries:
        return _read_listed(folder, entries)
    pooling_file = folder / "1_Pooling" / "config.json"
    if pooling_file.exists():
        pooling, include_prompt = _read_pooling(pooling_file)
        return Modules(pooling=pooling, include_prompt=include_prompt)
    config = read_json(folder / "config.json", default={})
    strategy = config.get("uniem_pooling_strategy", config.get("uniem_embedding_strategy"))
    if strategy is not None:
        if strategy not in UNIEM_POOLINGS:
            raise CheckpointError(
                f"config.json of {str(folder)!r} has uniem's pooling {strategy!r}, expected one of "
                f"{', '.join(UNIEM_POOLINGS)}"
            )
        return Modules(pooling=(UNIEM_POOLINGS[strategy],))
    _check_task(config, folder)
    origins = f"{name} {config.get('_name_or_path', '')}".lower()
    if any(maker in origins for maker in _MEAN_BY_NAME):
        return Modules(pooling=("mean",))
    raise CheckpointError(
        f"{str(folder)!r} does not say how its tokens are pooled: it has neither modules.json nor "
        "1_Pooling/config.json. Add 1_Pooling/config.json with what its authors used, for the mean "
        '{"pooling_mode": "mean"}, for the first token {"pooling_mode": "cls"}'
    )


def _check_task(config: dict[str, Any], folder: Path) -> None:
    """Refuse what was trained for something else than vectors of texts, and says so."""
    for name in map(str, config.get("architectures") or ()):
        if name.endswith("ForSequenceClassification"):
            raise CheckpointError(
                f"{str(folder)!r} is a {name}: a cross-encoder or classifier, which scores texts and makes no vectors. "
                "Use it with sentence-transformers' CrossEncoder. To embed with its encoder all the same, add "
                "1_Pooling/config.json"
            )
        if "colbert" in name.lower():
            raise CheckpointError(
                f"{str(folder)!r} is a {name}: it makes a vector for each token, and one for each text is made here. "
                "Use it with PyLate"
            )


def _read_entries(folder: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module in ``modules.json``; none without that file."""
    path = folder / "modules.json"
    if not path.exists():
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        entries = [(module["type"].rsplit(".", 1)[-1], str(module["path"])) for module in modules]
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} is no list of modules: {error!r}") from error
    for _, place in entries:
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise CheckpointError(f"{str(path)!r} names the folder {place!r}, expected one of the checkpoint's own")
    order = [kind for kind, _ in entries]
    if order[:2] != ["Transformer", "Pooling"] or not set(order[2:]) <= {"Dense", "Normalize", "Dropout"}:
        reason = next((_OTHERS[kind] for kind in order if kind in _OTHERS), None)
        if reason is None and "Pooling" not in order:
            reason = "without a Pooling it makes a vector for each token (ColBERT)"
        if reason is not None:
            raise CheckpointError(
                f"{str(path)!r} has the modules {', '.join(order)}: {reason}. Made here is one dense vector for each "
                "text; use it with the library that saved it"
            )
        raise CheckpointError(
            f"{str(path)!r} has the modules {', '.join(order)}; built here are Transformer, Pooling and then any "
            "number of Dense and Normalize. Save the model without the others, if it was trained without them"
        )
    return entries


def _read_listed(folder: Path, entries: list[tuple[str, str]]) -> Modules:
    pooling, include_prompt = _read_pooling(folder / entries[1][1] / "config.json")
    head: list[Dense | Normalize] = []
    for kind, place in entries[2:]:
        if kind == "Dense":
            head.append(_read_dense(folder / place))
        elif kind == "Normalize":
            _check_names(folder / place / "config.json")
            head.append(Normalize())
        # Dropout does nothing once training is over.
    return Modules(pooling=pooling, include_prompt=include_prompt, head=tuple(head))


def _read_pooling(path: Path) -> tuple[tuple[str, ...], bool]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        mode = config.get("pooling_mode")
        if mode is None:
            # Without any key set, sentence-transformers takes mean.
            mode = [name for key, name in LEGACY_KEYS.items() if config.get(key)] or ["mean"]
        modes = (mode,) if isinstance(mode, str) else tuple(mode)
        include_prompt = config.get("include_prompt", True)
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error
    if not modes or not set(modes) <= set(LEGACY_KEYS.values()):
        raise CheckpointError(
            f"{str(path)!r} asks for pooling {' + '.join(map(str, modes))}; expected some of "
            f"{', '.join(LEGACY_KEYS.values())}"
        )
    if type(include_prompt) is not bool:
        raise CheckpointError(f"{str(path)!r} has include_prompt {include_prompt!r}, expected true or false")
    return modes, include_prompt


def _read_dense(folder: Path) -> Dense:
    path = folder / "config.json"
    config = _check_names(path)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    kind = activation.rsplit(".", 1)[-1]
    if not activation.startswith("torch.nn.") or kind not in DENSE_ACTIVATIONS:
        raise CheckpointError(
            f"{str(path)!r} asks for the activation {activation!r}; built here are torch.nn's "
            f"{', '.join(DENSE_ACTIVATIONS)}"
        )
    if config.get("use_residual"):
        raise CheckpointError(f"{str(path)!r} asks for use_residual; only Dense layers without it are built here")
    try:
        shape = (int(config["out_features"]), int(config["in_features"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} has no in_features and out_features: {error!r}") from error
    expected = {"linear.weight": shape} | ({"linear.bias": shape[:1]} if config.get("bias", True) else {})
    tensors = read_tensors(find_weights(folder))
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected or not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise CheckpointError(
            f"the weights in {str(folder)!r} are {found}, expected {expected} by its config.json, and finite values"
        )
    return Dense(tensors["linear.weight"], tensors.get("linear.bias"), kind)


def _check_names(path: Path) -> dict[str, Any]:
    """Read a module's config and refuse one that works on anything but the sentence's vector."""
    config = read_json(path, default={})
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise CheckpointError(f"{str(path)!r} has {key} {config[key]!r}, built here is 'sentence_embedding'")
    return config
