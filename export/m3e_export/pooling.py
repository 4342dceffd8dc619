"""Which pooling a checkpoint was trained with: read, never guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m3e.errors import CheckpointError

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
SUPPORTED = ("mean", "cls")
# uniem's strategies (wangyuxinwhy/uniem: uniem/model.py, PoolingStrategy) that are one of ours.
_UNIEM = {"last_mean": "mean", "cls": "cls"}


def read_pooling(folder: Path, config: dict[str, Any], name: str) -> tuple[tuple[str, ...], bool]:
    """Read the modules behind the encoder.

    Args:
        folder: The checkpoint's folder.
        config: Content of its ``config.json``.
        name: Hub id or folder name; a BERT without a pooling file that names M3E gets mean, M3E's own pooling.

    Returns:
        The poolings, and whether a Normalize module follows.

    Raises:
        CheckpointError: No pooling is recorded, or one that is not supported.
    """
    modules_file = folder / "modules.json"
    if modules_file.exists():
        try:
            modules = json.loads(modules_file.read_text(encoding="utf-8"))
            kinds = [(module["type"].rsplit(".", 1)[-1], module["path"]) for module in modules]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{str(modules_file)!r} is no list of modules: {error!r}") from error
        order = [kind for kind, _ in kinds]
        if order not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise CheckpointError(
                f"{str(modules_file)!r} has the modules {', '.join(order)}; "
                "supported are Transformer, Pooling and, last, Normalize"
            )
        if kinds[0][1] not in ("", "."):
            raise CheckpointError(f"the Transformer module lies in {kinds[0][1]!r}; expected it in the folder itself")
        return _read_pooling_config(folder / kinds[1][1] / "config.json"), order[-1] == "Normalize"
    if (folder / "1_Pooling" / "config.json").exists():
        return _read_pooling_config(folder / "1_Pooling" / "config.json"), False
    strategy = config.get("uniem_pooling_strategy", config.get("uniem_embedding_strategy"))
    if strategy is not None:
        if strategy not in _UNIEM:
            raise CheckpointError(f"uniem's pooling {strategy!r} is not supported; supported are {', '.join(_UNIEM)}")
        return (_UNIEM[strategy],), False
    if "m3e" in f"{name} {config.get('_name_or_path', '')}".lower():
        return ("mean",), False
    raise CheckpointError(
        f"{str(folder)!r} does not say how its tokens are pooled: it has neither modules.json nor "
        '1_Pooling/config.json. Add 1_Pooling/config.json, for mean pooling with {"pooling_mode": "mean"}'
    )


def _read_pooling_config(path: Path) -> tuple[str, ...]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        mode = config.get("pooling_mode")
        if mode is None:
            # Without any key set, sentence-transformers takes mean.
            mode = [name for key, name in LEGACY_KEYS.items() if config.get(key)] or ["mean"]
        modes = (mode,) if isinstance(mode, str) else tuple(mode)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error
    if len(modes) != 1 or modes[0] not in SUPPORTED:
        raise CheckpointError(
            f"{str(path)!r} asks for pooling {' + '.join(map(str, modes))}; supported is one of {', '.join(SUPPORTED)}"
        )
    if config.get("include_prompt") is False:
        raise CheckpointError(f"{str(path)!r} leaves the prompt out of the pooling; that is not supported")
    return modes
