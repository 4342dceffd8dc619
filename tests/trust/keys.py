"""The check of API keys takes the same path whether a key is right, wrong or of another length.

Time itself is not measured: on a shared machine that would measure the neighbours. What is checked is the path: each
known key is compared once with `hmac.compare_digest`, and both sides are digests of one length.
"""

from __future__ import annotations

import hashlib
import hmac
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

from m3e.server.gate import Gate
from m3e.server.problems import Problem
from tests.trust import Figure, Outcome, counted

_KEYS = ("alpha", "beta", "gamma", "é")
_ACCEPTED = (*[f"Bearer {key}".encode() for key in _KEYS], b"bearer alpha", b"BEARER  beta ")
Check = Callable[[Any, list[tuple[bytes, bytes]]], None]


def headers(rng: random.Random) -> tuple[list[tuple[bytes, bytes]], bool]:
    """Draw an authorization, and say whether it is right."""
    if rng.random() < 0.2:
        return [(b"authorization", rng.choice(_ACCEPTED))], True
    key = bytearray(rng.choice(_KEYS).encode())
    key[rng.randrange(len(key))] ^= 1 << rng.randrange(5)
    value = rng.choice((b"Bearer " + bytes(key), b"Basic alpha", b"alpha", b"", b"Bearer", b"Bearer alpha beta",
                        b"Bearer alph", b"Bearer alphaa", b"Bearer \xff", b"Bearer " + b"x" * 1_000_000))  # fmt: skip
    return rng.choice(([(b"authorization", value)], [(b"authorization", b"Bearer alpha")] * 2, [])), False


def attack(check: Check, count: int) -> int:
    """Check drawn headers: how many were judged wrongly, or on another path."""
    app = SimpleNamespace(_keys=[hashlib.sha256(key.encode()).digest() for key in _KEYS])
    rng, wrong = random.Random(0), 0
    for _ in counted(count):
        given, right = headers(rng)
        with mock.patch("hmac.compare_digest", wraps=hmac.compare_digest) as compared:
            try:
                check(app, given)
                accepted = True
            except Problem as problem:
                accepted = problem.code != "invalid_api_key"
        same_path = [call.args[1] for call in compared.call_args_list] == app._keys
        one_length = all(len(call.args[0]) == len(call.args[1]) for call in compared.call_args_list)
        wrong += accepted is not right or not same_path or not one_length
    return wrong


def _refuse() -> None:
    raise Problem("invalid_api_key", "no")


def _with_equality(app: Any, given: list[tuple[bytes, bytes]]) -> None:
    """The mistake of TEI and infinity."""
    values = dict(given)
    if len(given) != 1 or hashlib.sha256(values[b"authorization"].partition(b" ")[2].strip()).digest() not in app._keys:
        _refuse()


def _with_early_exit(app: Any, given: list[tuple[bytes, bytes]]) -> None:
    """The mistake: the first key that fits ends it, so the time tells which."""
    scheme, _, key = (given[0][1] if len(given) == 1 else b"").partition(b" ")
    digest = hashlib.sha256(key.strip()).digest()
    if not any(hmac.compare_digest(digest, known) for known in app._keys) or scheme.lower() != b"bearer":
        _refuse()


def measure(count: int) -> Outcome:
    """The server's own check."""
    wrong = attack(Gate._check_key, count)
    caught = {"==": attack(_with_equality, 50) > 0, "early exit": attack(_with_early_exit, 50) > 0}
    return Outcome(f"{wrong} of {count:,}", wrong == 0, caught)


FIGURES = (
    Figure(
        "F5", "API keys judged wrongly, or not by comparing every one in constant time", "0",
        measure, quick=1000, soak=100_000,
    ),
)  # fmt: skip
