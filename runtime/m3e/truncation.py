"""Texts that were longer than the model reads: counted, and told once a call."""

from __future__ import annotations

import warnings

from m3e.tokenizer import TokenIds


class TruncationWarning(UserWarning):
    """Some texts were longer than the model's ``max_seq_length`` and were cut."""


class Truncations:
    """The texts of one call that were cut, counted over windows.

    Args:
        max_seq_length: Where they are cut, in tokens.
    """

    def __init__(self, max_seq_length: int) -> None:
        self._max_seq_length = max_seq_length
        self._seen = self._count = 0
        self._first: tuple[int, int] | None = None

    def add(self, tokens: TokenIds) -> None:
        """Count the next texts."""
        (cut,) = (tokens.n_tokens_full > tokens.n_tokens).nonzero()
        if len(cut) and self._first is None:
            self._first = self._seen + int(cut[0]), int(tokens.n_tokens_full[cut[0]])
        self._count += len(cut)
        self._seen += len(tokens.n_tokens)

    def warn(self, stacklevel: int) -> None:
        """Warn if there were any, at the line so many calls up."""
        if self._first is not None:
            warnings.warn(
                f"{self._count} of {self._seen} texts are longer than {self._max_seq_length} tokens and were cut "
                f"(the first is text {self._first[0]}, with at least {self._first[1]} tokens); split them to embed all",
                TruncationWarning,
                stacklevel=stacklevel,
            )
