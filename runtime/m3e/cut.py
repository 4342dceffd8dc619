"""Cut a text far longer than the model reads before it is tokenised, so that it costs milliseconds, not seconds.

`cutter` gives a function (text, n_tokens) -> a shorter text whose first ``n_tokens`` ids are the whole
text's, and that has more of them than ``n_tokens`` if and only if the whole text has; or None where this cannot be
proven for the tokenizer. Special tokens around the text are not counted here.

BERT's tokenizer (`_BertCutter`). BertNormalizer works character by character, except that it may reorder combining
marks; BertPreTokenizer then splits at white space and isolates punctuation and CJK ideographs. What a character does
is therefore known from asking the tokenizer about ``aXa``: it vanishes, separates, is a token by itself, or is part of
a word. Hence three facts. (1) Each isolated character and each word gives at least one token, so counting them tells
how much of the text is enough, and no token reaches across an isolated character. (2) A word of more than
``max_input_chars_per_word`` characters is one [UNK], whatever else it holds. (3) Of several white spaces, or several
vanishing characters, one does what all do. (2) and (3) shorten what (1) does not cut. Where that leaves much, it is of
words with many tokens each: a prefix is tokenised to see that it is long enough. Added tokens such as [MASK] are
found in the raw text before all this. Each begins and ends with characters that none has elsewhere: the first counts
for it, the others count for nothing, no cut lies inside one; one vanishing character always stays, to keep apart what
it kept apart; and what stays of a word is longer than any added token.

Others (`_SpaceCutter`): a cut before a single space or line feed between ASCII letters, digits or CJK ideographs. All
of these are starters that no normalisation form combines with what stands before them, so the normalizers
listed below do on either side what they do in the whole; the listed pre-tokenizers begin a new word there; models
see one word at a time. The prefix is tokenised to see that it is long enough, and doubled while it is not.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

Cutter = Callable[[str, int], str]

# What a character does. OTHER is always safe: never counted, never dropped, never cut beside. OPENING and CLOSING
# are the first and last characters of added tokens. `_shorten` relies on the order of the last three.
_UNKNOWN, _OTHER, _OPENING, _CLOSING, _TOKEN, _SPACE, _NOTHING, _WORD = range(8)
_MAX_WINDOW = 1 << 16  # its arrays stay in a core's second-level cache
_ADDED_TOKEN_LIMIT = 64
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled", "BertNormalizer"}
_PRE_TOKENIZERS = {"WhitespaceSplit", "Whitespace", "BertPreTokenizer", "Metaspace", "ByteLevel"}
_PLAIN = "[0-9A-Za-z\u4e00-\u9fa5]"
_BREAK = re.compile(f"(?<={_PLAIN})[ \n](?={_PLAIN})")


def cutter(tokenizer: tokenizers.Tokenizer) -> Cutter | None:
    """Choose the way to cut for a tokenizer.

    Args:
        tokenizer: Without truncation.

    Returns:
        None where no cut is known to be safe: the whole text has to be tokenised.
    """
    added = list(tokenizer.get_added_tokens_decoder().values())
    normalizers, pre_tokenizers = _steps(tokenizer.normalizer), _steps(tokenizer.pre_tokenizer)
    if (
        [step["type"] for step in normalizers + pre_tokenizers] == ["BertNormalizer", "BertPreTokenizer"]
        and isinstance(tokenizer.model, tokenizers.models.WordPiece)
        and _are_bracketed(added)
    ):
        longest_word = max(tokenizer.model.max_input_chars_per_word, _ADDED_TOKEN_LIMIT)
        return _BertCutter(tokenizer, [token.content for token in added], longest_word)
    if (
        not any(character.isspace() for token in added for character in token.content)
        and all(map(_is_local_normalizer, normalizers))
        and all(step["type"] in _PRE_TOKENIZERS for step in pre_tokenizers)
        and any(map(_splits_at_spaces, pre_tokenizers))
    ):
        return _SpaceCutter(tokenizer)
    return None


class _BertCutter:
    """Counts and shortens by what each character does; remembers that for every character it has seen."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, added: list[str], longest_word: int) -> None:
        self._tokenizer = tokenizer
        self._longest_word = longest_word
        self._kinds = np.full(0x110000, _UNKNOWN, dtype=np.uint8)
        for token in added:
            for character in token:
                if not character.isalnum():
                    self._kinds[ord(character)] = _OTHER
        for token in added:
            self._kinds[[ord(token[0]), ord(token[-1])]] = _OPENING, _CLOSING
        self._look_up(np.arange(128, dtype=np.uint32))
        self._ascii_kinds = self._kinds[:256].tobytes()

    def __call__(self, text: str, n_tokens: int) -> str:
        shortened = self._shorten_text(text, n_tokens)
        # A word is counted as one token and may be fifty: of long words a few are enough.
        size = n_tokens + 64
        while 8 * size < len(shortened) and size <= 8 * n_tokens + 64:
            begins = np.flatnonzero(_begins(self._kinds_of(shortened[:size])))
            if len(begins):
                prefix = shortened[: int(begins[-1])]
                if len(self._tokenizer.encode_batch_fast([prefix], add_special_tokens=False)[0].ids) > n_tokens:
                    return prefix
            size *= 2
        return shortened

    def _shorten_text(self, text: str, n_tokens: int) -> str:
        kept: list[str] = []
        size = min(8 * n_tokens + 64, _MAX_WINDOW)
        start = count = 0
        before = ""
        while start < len(text):
            window = text[start : start + size]
            if window != before:  # floods are often of one character
                before, kinds = window, self._kinds_of(window)
                flood = self._shorten_flood(window, kinds)
            if flood is not None:
                kept.append(flood)
            else:
                begins = _begins(kinds)
                found = int(np.count_nonzero(begins))
                if count + found > n_tokens + 1:
                    cut = int(np.flatnonzero(begins)[n_tokens + 1 - count])  # in front of it are n_tokens + 1 or more
                    kept.append(window[:cut])
                    break
                count += found
                kept.append(self._shorten(window, kinds))
            start += size
            size = min(2 * size, _MAX_WINDOW)
        return "".join(kept)

    def _kinds_of(self, window: str) -> npt.NDArray[np.uint8]:
        if window.isascii():
            return np.frombuffer(window.encode("ascii").translate(self._ascii_kinds), dtype=np.uint8)
        return self._look_up(np.frombuffer(window.encode("utf-32-le"), dtype=np.uint32))

    def _look_up(self, codes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
        kinds = np.take(self._kinds, codes, mode="clip")  # nothing to clip; it is the fastest mode
        if not kinds.all():
            for code in np.unique(codes[kinds == _UNKNOWN]).tolist():
                self._kinds[code] = self._ask(chr(code))
            kinds = np.take(self._kinds, codes, mode="clip")
        return kinds

    def _ask(self, character: str) -> int:
        assert self._tokenizer.normalizer is not None
        assert self._tokenizer.pre_tokenizer is not None
        normalized = self._tokenizer.normalizer.normalize_str(f"a{character}a")
        match [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]:
            case ["aa"]:
                return _NOTHING
            case ["a", "a"]:
                return _SPACE
            case ["a", isolated, "a"] if len(isolated) == 1:
                return _TOKEN
            case [word] if word.startswith("a") and word.endswith("a"):
                return _WORD
        return _OTHER

    def _shorten_flood(self, window: str, kinds: npt.NDArray[np.uint8]) -> str | None:
        """Shorten a window that is the inside of one word, or holds no word at all; None for any other."""
        lowest, highest = int(kinds.min()), int(kinds.max())
        if lowest >= _NOTHING:
            end = _find(kinds == _WORD, self._longest_word)
            if end is not None:
                return window[: end + 1]
        if lowest >= _SPACE and highest <= _NOTHING:
            space = _find(kinds == _SPACE, 0)
            return window[0] + window[space] if space else window[0]
        return None

    def _shorten(self, window: str, kinds: npt.NDArray[np.uint8]) -> str:
        """Leave out what facts (2) and (3) allow, within the window."""
        is_word, is_nothing = kinds == _WORD, kinds == _NOTHING
        words = np.cumsum(is_word, dtype=np.int32)
        # Characters of the word so far: less what stood in front of the last one that is no part of a word.
        in_word = words - np.maximum.accumulate(np.where(is_word | is_nothing, np.int32(0), words))
        keep = in_word <= self._longest_word + 1
        keep[1:] &= (kinds[1:] != kinds[:-1]) | ~(is_nothing | (kinds == _SPACE))[1:]
        codes = np.frombuffer(window.encode("utf-32-le"), dtype=np.uint32)
        return codes[keep].tobytes().decode("utf-32-le")


def _find(where: npt.NDArray[np.bool_], n: int) -> int | None:
    """Position of true number n, from 0; one near the front is found without a look at the rest."""
    for part in (where[: 16 * (n + 1)], where):
        found = np.flatnonzero(part)
        if len(found) > n:
            return int(found[n])
    return None


def _begins(kinds: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Where a token certainly begins that no other place here counts, and that no token reaches across."""
    here, before = kinds[1:], kinds[:-1]
    begins: npt.NDArray[np.bool_] = (kinds == _TOKEN) | (kinds == _OPENING)
    begins[1:] |= (here == _WORD) & ((before == _SPACE) | (before == _TOKEN))
    begins[1:] |= (here == _CLOSING) & (before == _CLOSING)
    return begins


class _SpaceCutter:
    """Cuts at a space, and sees by tokenising that enough is left."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, n_tokens: int) -> str:
        size = 8 * n_tokens + 64
        while size < len(text):
            # From the end of the prefix backwards, a little at a time: the last break is wanted.
            near = [match.start() for match in _BREAK.finditer(text, max(0, size - 4096), size)]
            if near:
                prefix = text[: near[-1]]
                if len(self._tokenizer.encode_batch_fast([prefix], add_special_tokens=False)[0].ids) > n_tokens:
                    return prefix
            size *= 2
        return text


def _steps(part: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps, each as ``tokenizer.json`` has it."""
    return [] if part is None else _flatten(json.loads(part.__getstate__()))


def _flatten(part: dict[str, Any]) -> list[dict[str, Any]]:
    if part["type"] == "Sequence":
        inner = part["normalizers"] if "normalizers" in part else part["pretokenizers"]
        return [step for one in inner for step in _flatten(one)]
    return [part]


def _are_bracketed(added: list[tokenizers.AddedToken]) -> bool:
    """Whether the added tokens are like [CLS]: found in the raw text, with ends that none of them has inside."""
    contents = [token.content for token in added]
    openings, closings = {content[0] for content in contents}, {content[-1] for content in contents}
    insides = {character for content in contents for character in content[1:-1]}
    return (
        not any(token.normalized or token.single_word for token in added)
        and all(2 < len(content) <= _ADDED_TOKEN_LIMIT for content in contents)
        and all(character in string.punctuation for character in openings | closings)
        and all(character in string.punctuation + string.ascii_letters + string.digits for character in insides)
        and not (openings & closings or (openings | closings) & insides)
    )


def _is_local_normalizer(step: dict[str, Any]) -> bool:
    """XLM-R's converted tokenizers also squeeze runs of spaces, and a cut never lies in one."""
    squeezes = step["type"] == "Replace" and step.get("pattern") == {"Regex": " {2,}"}
    return step["type"] in _NORMALIZERS or squeezes


def _splits_at_spaces(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("split", True) is not False
    if step["type"] == "ByteLevel":
        return step.get("use_regex", True) is not False
    return step["type"] in _PRE_TOKENIZERS
