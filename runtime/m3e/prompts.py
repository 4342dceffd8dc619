"""Which text is put before the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m3e.errors import InputError
from m3e.manifest import Model


def find_prompt(model: Model, prompt_name: str | None, prompt: str | None) -> str:
    """Settle the prompt of a call: the one given, the one named, or the model's default; empty for none.

    Raises:
        InputError: The model has no prompt of that name, or a prompt is no text.
    """
    if prompt is not None:
        if not isinstance(prompt, str):
            raise InputError(f"prompt is {prompt!r}, expected a str")
        return prompt
    name = model.default_prompt_name if prompt_name is None else prompt_name
    if name is None:
        return ""
    if name not in model.prompts:
        available = ", ".join(map(repr, model.prompts)) or "none"
        raise InputError(f"there is no prompt named {name!r}; the bundle has {available}")
    return model.prompts[name]


def with_prompt_of(model: Model, names: Sequence[str], arguments: dict[str, Any]) -> dict[str, Any]:
    """Add to a call's arguments the first of some prompts that the model has, unless the caller chose one."""
    if arguments.get("prompt") is None and arguments.get("prompt_name") is None:
        return {**arguments, "prompt_name": next((name for name in names if name in model.prompts), None)}
    return arguments
