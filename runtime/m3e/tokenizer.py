"""Texts -> token ids, as the checkpoint's own tokenizer does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from m3e.cut import cutter
from m3e.errors import BundleError, InferenceError, InputError

# Bounds on the Encoding objects alive at once (each keeps offsets and token strings, about 100 bytes a token).
_CHUNK = 2048
_CHUNK_CHARACTERS = 1 << 18
# Characters from which a text is cut first; below, cutting saves next to nothing.
_LONG_CHARACTERS = 8192


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The token ids of some texts.

    Attributes:
        input_ids: One list per text, special tokens included, at most ``max_seq_length`` long.
        n_tokens: int64 (n,), the lengths of those lists.
        n_tokens_full: int64 (n,), the lengths without truncation; larger than ``n_tokens`` if and only if the text was
            truncated. Of a very long text it is only a number that the length is known to reach.
    """

    input_ids: list[list[int]]
    n_tokens: npt.NDArray[np.int64]
    n_tokens_full: npt.NDArray[np.int64]


class Tokenizer:
    """A ``tokenizer.json`` with its truncation done here, so that what is cut off is known.

    Args:
        data: Content of ``tokenizer.json``.
        max_seq_length: Longest list of ids to return, special tokens included.

    Raises:
        BundleError: The content is no tokenizer.
    """

    def __init__(self, data: bytes, max_seq_length: int) -> None:
        self.max_seq_length = max_seq_length
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._cut = cutter(self._tokenizer)
            # Ids behind the text ([SEP]); truncation cuts before them. The template does not depend on the text.
            self._n_suffix = _trailing(self._tokenizer.encode("a").special_tokens_mask)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise BundleError(f"tokenizer.json cannot be read: {error}") from error

    def __call__(self, texts: Sequence[str]) -> TokenIds:
        """Tokenise texts; right truncation keeps the closing special tokens.

        A very long text is cut before it is tokenised.

        Raises:
            InputError: A text is not valid Unicode (a lone surrogate).
            InferenceError: The library tokenizers failed by itself.
        """
        input_ids: list[list[int]] = []
        n_tokens_full = np.empty(len(texts), dtype=np.int64)
        keep = self.max_seq_length - self._n_suffix
        cut = [self._cut_long(text, i) for i, text in enumerate(texts)]
        for chunk in _chunks(cut) if len(cut) > 1 else [cut]:
            for encoding in self._encode(chunk, len(input_ids)):
                ids = encoding.ids
                n_tokens_full[len(input_ids)] = len(ids)
                if len(ids) > self.max_seq_length:
                    ids = ids[:keep] + ids[len(ids) - self._n_suffix :]
                input_ids.append(ids)
        return TokenIds(input_ids, np.minimum(n_tokens_full, self.max_seq_length), n_tokens_full)

    def encode_with_offsets(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[tuple[int, str, bool, int, int]]]:
        """Tokenise without truncation; each token as id, word, whether special, first and last + 1 character."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [
            [
                (token, word, bool(special), *span)
                for token, word, special, span in zip(
                    encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
                )
            ]
            for encoding in encodings
        ]

    def decode(self, input_ids: Sequence[list[int]], skip_special_tokens: bool = True) -> list[str]:
        """Turn ids back into texts, words apart by spaces."""
        texts: list[str] = self._tokenizer.decode_batch(list(input_ids), skip_special_tokens=skip_special_tokens)
        return texts

    def count(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Count the tokens of whole texts, special tokens included: int64 (n,).

        Raises:
            InputError: A text is not valid Unicode (a lone surrogate).
        """
        counts: list[int] = []
        for chunk in _chunks(texts):
            counts += [len(encoding.ids) for encoding in self._encode(chunk, len(counts))]
        return np.array(counts, dtype=np.int64)

    def _cut_long(self, text: str, index: int) -> str:
        if self._cut is None or len(text) <= _LONG_CHARACTERS:
            return text
        _check_unicode(text, index)  # all of it: what the model does not read may still be a sign of wrong decoding
        return self._cut(text, self.max_seq_length)

    def _encode(self, texts: Sequence[str], first: int) -> list[tokenizers.Encoding]:
        try:
            return self._tokenizer.encode_batch_fast(list(texts))
        except (TypeError, UnicodeEncodeError):
            for i, text in enumerate(texts):
                _check_unicode(text, first + i)
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            raise InferenceError(f"tokenizers failed on {len(texts)} texts: {error}") from error


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Split texts into lists that are tokenised together; a text that is longer than a chunk is one by itself."""
    chunk: list[str] = []
    n_characters = 0
    for text in texts:
        if chunk and (len(chunk) == _CHUNK or n_characters + len(text) > _CHUNK_CHARACTERS):
            yield chunk
            chunk, n_characters = [], 0
        chunk.append(text)
        n_characters += len(text)
    if chunk:
        yield chunk


def is_failure(error: BaseException) -> bool:
    """Whether the library tokenizers failed, and not somebody who ends the process.

    Its errors are bare Exceptions. What panics in its Rust, such as for want of memory for its threads, is of a class
    that is no Exception and has no name to import.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def check_texts(sentences: Any) -> list[str]:
    """Accept lists, tuples and arrays of str and nothing else.

    Returns:
        The texts as a list.

    Raises:
        InputError: Another type; for an item of the wrong type the message gives its index.
    """
    if isinstance(sentences, str):
        raise InputError("sentences is a str, expected a list of str; put the text into a list")
    if isinstance(sentences, np.ndarray):
        sentences = sentences.tolist()
    if not isinstance(sentences, Sequence) or isinstance(sentences, (bytes, bytearray)):
        hint = "decode it first" if isinstance(sentences, (bytes, bytearray)) else "for a stream use encode_iter"
        raise InputError(f"sentences is {type(sentences).__name__}, expected a str or a list of str; {hint}")
    for i, text in enumerate(sentences):
        if not isinstance(text, str):
            raise InputError(f"sentences[{i}] is {type(text).__name__}, expected str")
    return list(sentences)


def _check_unicode(text: str, index: int) -> None:
    try:
        text.encode("utf-16")  # as strict as UTF-8, and five times as fast
    except UnicodeEncodeError as error:
        raise InputError(
            f"text {index} is not valid Unicode: lone surrogate at character {error.start}; "
            "decode it with errors='replace' where it is read"
        ) from error


def _trailing(special_tokens_mask: list[int]) -> int:
    """Count the ones at the end."""
    n = 0
    while n < len(special_tokens_mask) and special_tokens_mask[-1 - n]:
        n += 1
    return n
