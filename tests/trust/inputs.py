"""Any text gives a finite vector of the right shape, or an InputError that says which text and why.

Every shard of texts runs in a process of its own: a crash of a native library and a hang are findings too.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from m3e import Encoder, InputError, TruncationWarning
from m3e.progress import progress_bar
from tests.trust import Figure, Outcome
from tests.trust.children import Died, in_child
from tests.trust.models import tiny_bundle
from tests.trust.texts import TEXTS, mutations

Findings = list[str]
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHARD = 5000
_SHARD_TIMEOUT_S = 900.0  # for a minute's work
_CONTROL = 500


def examine(encoder: Encoder, texts: Sequence[str]) -> Findings:
    """Encode a batch in every way there is, and say what is wrong."""
    findings = []
    valid = [text for text in texts if not _SURROGATE.search(text)]
    if len(valid) < len(texts):
        for call in (encoder.encode, encoder.tokenize, encoder.count_tokens):
            try:
                call(list(texts))
            except InputError as error:
                if "lone surrogate" not in str(error):
                    findings.append(f"{call.__name__} refused a lone surrogate without saying so: {error}")
            except Exception as error:
                findings.append(f"{call.__name__} raised {error!r:.200}")
            else:
                findings.append(f"{call.__name__} took a lone surrogate")
    try:
        vectors = encoder.encode(valid, normalize_embeddings=True)
        inputs = encoder.tokenize(valid)
        # Counting all of ten megabytes takes seconds, as its docstring says.
        short = [i for i, text in enumerate(valid) if len(text) <= 1_000_000]
        counts = encoder.count_tokens([valid[i] for i in short])
    except Exception as error:
        return [*findings, f"{error!r:.200}"]
    if vectors.shape != (len(valid), encoder.manifest.model.embedding_dim) or vectors.dtype != np.float32:
        findings.append(f"vectors are {vectors.dtype} {vectors.shape} for {len(valid)} texts")
    elif not np.isfinite(vectors).all() or not (np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-5).all():
        findings.append("a vector is not finite or not of unit length")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    lengths = mask.sum(axis=1)
    if ids.shape != mask.shape or len(ids) != len(valid) or ids.shape[1] > encoder.max_seq_length:
        findings.append(f"input_ids are {ids.shape} for {len(valid)} texts, the mask {mask.shape}")
    elif len(valid) and (lengths.min() < 2 or (np.sort(mask, axis=1)[:, ::-1] != mask).any()):
        findings.append("a mask is not ones and then zeros, or holds no text")
    elif not np.array_equal(np.minimum(counts, encoder.max_seq_length), lengths[short]):
        findings.append("a mask has another length than the count of tokens")
    elif len(valid) and not 0 <= ids.min() <= ids.max() < encoder.manifest.model.vocab_size:
        findings.append("an id is not of the vocabulary")
    return findings


def batches(texts: Sequence[str]) -> list[Sequence[str]]:
    """Cut into batches of 1 to 64."""
    rng, start, found = np.random.default_rng(len(texts)), 0, []
    while start < len(texts):
        size = int(2 ** rng.uniform(0, 6))
        found.append(texts[start : start + size])
        start += size
    return found


def attack_shard(make: Callable[[], Encoder], seed: int, count: int) -> Findings:
    """Throw mutated texts at an encoder."""
    encoder = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return [finding for batch in batches(list(mutations(seed, count))) for finding in examine(encoder, batch)]


def attack(make: Callable[[], Encoder], count: int, timeout_s: float = _SHARD_TIMEOUT_S) -> Findings:
    """The same, shard by shard."""
    findings = []
    tiny_bundle()  # here, so that no child's time goes into it
    with progress_bar(count, "text") as progress:
        for start in range(0, count, _SHARD):
            size = min(_SHARD, count - start)
            try:
                findings += in_child(attack_shard, make, start // _SHARD, size, timeout_s=timeout_s)
            except Died as error:
                findings.append(f"texts from {start}: {error}")
            progress.update(size)
    return findings


class _Broken(Encoder):
    """A stand-in with one of the defects that the check is there for."""

    defect = ""

    def encode(self, sentences: Any, *arguments: Any, **options: Any) -> Any:
        if self.defect == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.defect == "hang":
            time.sleep(3600)
        if self.defect == "surrogates replaced":
            sentences = [text.encode("utf-8", "replace").decode() for text in sentences]
        if self.defect == "empty texts dropped":
            sentences = [text for text in sentences if text.strip()]
        vectors = super().encode(sentences, *arguments, **options)
        if self.defect == "NaN now and then" and len(vectors) > 3:
            vectors[len(vectors) // 2, 0] = np.nan
        return vectors

    def tokenize(self, sentences: Any) -> Any:
        inputs = super().tokenize(sentences)
        if self.defect == "mask from ids":
            inputs["attention_mask"] = (inputs["input_ids"] != 0).astype(np.int64)
        return inputs


def _make_broken(defect: str) -> Encoder:
    encoder = _Broken(tiny_bundle(), num_threads=1)
    encoder.defect = defect
    return encoder


def _make() -> Encoder:
    return Encoder(tiny_bundle(), num_threads=1)


_DEFECTS = ("surrogates replaced", "empty texts dropped", "NaN now and then", "mask from ids")
_FATAL = (("crash", _SHARD_TIMEOUT_S), ("hang", 5.0))


def measure_mutations(count: int) -> Outcome:
    """Mutations of the shipped corpus."""
    findings = attack(_make, count)
    caught = {defect: bool(attack_shard(functools.partial(_make_broken, defect), 0, _CONTROL)) for defect in _DEFECTS}
    for defect, timeout_s in _FATAL:
        caught[defect] = bool(attack(functools.partial(_make_broken, defect), 1, timeout_s))
    return Outcome(f"{len(findings)} of {count:,}" + _first(findings), not findings, caught)


def measure_hypothesis(count: int) -> Outcome:
    """Texts that hypothesis draws, in lists."""
    found = examine_drawn(_make(), count)
    drawn = {
        defect: bool(examine_drawn(_make_broken(defect), 200))
        for defect in ("surrogates replaced", "NaN now and then", "mask from ids")
    }
    return Outcome(f"{len(found)} of {count:,} lists" + _first(found), not found, drawn)


def examine_drawn(encoder: Encoder, count: int) -> Findings:
    """Examine lists that hypothesis draws; the first failing one ends it."""
    found: Findings = []

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(TEXTS, min_size=1, max_size=8))
    def run(texts: list[str]) -> None:
        found.extend(islice(examine(encoder, texts), 1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        run()
    return found


def _first(findings: Findings) -> str:
    return f"; first: {findings[0]}" if findings else ""


FIGURES = (
    Figure(
        "A1", "mutated texts that crash, hang, give a value that is not finite or another shape", "0 of 1,000,000",
        measure_mutations, quick=400, long=20_000, soak=1_000_000,
    ),
    Figure(
        "A1b", "the same for lists of texts that hypothesis draws", "0",
        measure_hypothesis, quick=200, long=500, soak=50_000,
    ),
)  # fmt: skip
