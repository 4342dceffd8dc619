"""Memory of the service while everybody sends as much as they may."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from typing import Any

from benchmarks.server_process import COMMAND, running
from tests import wire
from tests.trust import Figure, Outcome
from tests.trust.careless_server import careless
from tests.trust.children import in_child
from tests.trust.models import tiny_bundle

_BODY_BYTES = 2_000_000
_CONNECTIONS = 256
_GROWTH_KB = 256 << 10
# Texts that are run or have to wait, one text that is cut, texts to parse and tokenise, and what is no text at all.
_INPUTS: dict[str, Any] = {
    "500 texts of 512 tokens": ["天" * 1330] * 500,
    "one text": "天" * 666_000,
    "2048 texts of few tokens": ["x" * 970] * 2048,
    "empty lists": [[]] * 650_000,
}


def _bodies() -> list[bytes]:
    made = [json.dumps({"inputs": inputs}, ensure_ascii=False, separators=(",", ":")).encode()
            for inputs in _INPUTS.values()]  # fmt: skip
    return [body.ljust(_BODY_BYTES) for body in made]


def flood(port: int, seconds: float) -> Counter[int]:
    """Send bodies over and over on every connection, whatever is answered; the statuses, 0 for a broken connection."""
    statuses: Counter[int] = Counter()
    bodies = _bodies()
    assert {len(body) for body in bodies} == {_BODY_BYTES}
    until = time.monotonic() + seconds

    async def client(number: int) -> None:
        kinds = itertools.islice(itertools.cycle(bodies), number, None)
        while time.monotonic() < until:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                closes = False
                while not closes and time.monotonic() < until:
                    body = next(kinds)
                    writer.write(wire.head(len(body)) + body)
                    status, closes, _ = await wire.read_answer(reader)
                    statuses[status] += 1
                writer.close()
            except (OSError, asyncio.IncompleteReadError):
                statuses[0] += 1

    async def clients() -> None:
        await asyncio.gather(*(client(number) for number in range(_CONNECTIONS)))

    asyncio.run(clients())
    return statuses


def growth_kb(seconds: float, command: tuple[str, ...] = COMMAND) -> tuple[int, Counter[int]]:
    """How much a fresh server and its worker grow at most while they are flooded, and what they answered."""
    with running(tiny_bundle(), command=command) as server:
        before = server.resident_kb()
        server.forget_peaks()
        statuses = in_child(flood, server.port, seconds)
        server.wait_until(True)
        assert server.post("/embed", {"inputs": "a"}).status == 200
        return server.resident_kb(peak=True) - before, statuses


def measure_bodies(count: int) -> Outcome:
    """So many seconds; the mistake takes a few."""
    grown_kb, statuses = growth_kb(count)
    careless_kb, _ = growth_kb(min(count, 5), careless("every body is held"))
    expected = {200, 422, 429}
    return Outcome(
        f"{grown_kb / 1024:+.0f} MB in {count} s; {sum(statuses.values()):,} bodies, {statuses[200]} of them run, "
        f"{statuses[429]:,} times 429, {sum(n for status, n in statuses.items() if status not in expected)} lost",
        grown_kb <= _GROWTH_KB and set(statuses) <= expected,
        {"every body is held": careless_kb > _GROWTH_KB},
    )


FIGURES = (
    Figure(
        "C5", "memory while 256 connections send bodies of 2 MB without a pause", "<= 256 MB",
        measure_bodies, long=20, soak=60,
    ),
)  # fmt: skip
