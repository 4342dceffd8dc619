"""Requests that leave at their times, whatever has become of those before."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended: its status, 0 if the connection broke, and seconds since it should have left."""

    status: int
    seconds: float


async def open_loop(
    port: int,
    texts: Sequence[str],
    *,
    rate_per_s: float,
    seconds: float,
    seed: int = 0,
    connections: int = 1024,
    path: str = "/embed",
    model: str = "",
) -> list[Outcome]:
    """Send single texts at Poisson arrival times to ``/embed`` or ``/v1/embeddings`` on loopback.

    A pool of kept connections grows as needed, up to a bound. Latency counts from the intended time, so a generator
    that falls behind makes the figures worse, never better.
    """
    rng = random.Random(seed)
    field = "inputs" if path == "/embed" else "input"
    extra = {"model": model, "encoding_format": "base64"} if model else {}
    head = f"POST {path} ".encode() + b"HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    messages = []
    for text in texts:
        body = json.dumps({field: text, **extra}, ensure_ascii=False).encode()
        messages.append(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    free = asyncio.Semaphore(connections)
    outcomes: list[Outcome] = []

    async def one(message: bytes, due: float) -> None:
        async with free:
            try:
                reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
                writer.write(message)
                answer = await reader.readuntil(b"\r\n\r\n")
                length = answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length))
                outcomes.append(Outcome(int(answer[9:12]), time.perf_counter() - due))
                idle.append((reader, writer))
            except (OSError, asyncio.IncompleteReadError):
                outcomes.append(Outcome(0, time.perf_counter() - due))

    n = round(rate_per_s * seconds)
    tasks = []
    due = time.perf_counter()
    for i in range(n):
        due += rng.expovariate(rate_per_s)
        if (ahead := due - time.perf_counter()) > 0:
            await asyncio.sleep(ahead)
        tasks.append(asyncio.create_task(one(messages[i % len(messages)], due)))
    await asyncio.gather(*tasks)
    for _, writer in idle:
        writer.close()
    return outcomes
