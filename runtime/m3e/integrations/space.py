"""An index remembers which vectors it holds, and refuses others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3e.encoder import Encoder
from m3e.errors import InputError

SPACE_KEY = "m3e_space_id"


def check_space(stored: Mapping[str, Any] | None, encoder: Encoder, where: str) -> None:
    """Compare what an index remembers with an encoder.

    Raises:
        InputError: The index does not say, or holds vectors that cannot be compared with the encoder's.
    """
    found, own = (stored or {}).get(SPACE_KEY), encoder.manifest.space_id
    if found is None:
        raise InputError(f"{where} does not say which vectors it holds; index it again through m3e")
    if found != own:
        raise InputError(
            f"{where} holds vectors of the space {found}, the bundle's are {own}; they cannot be compared. Open the "
            "bundle that it was indexed with, or index it again"
        )


def space_metadata(encoder: Encoder) -> dict[str, str]:
    """What an index is to remember."""
    return {SPACE_KEY: encoder.manifest.space_id}
