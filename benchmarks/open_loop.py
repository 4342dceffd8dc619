"""Requests that leave at their times, whatever has become of those before."""

from __future__ import annotations

import gc
import json
import multiprocessing
import random
import re
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

# An answer that has not come so long after the last request left counts as lost.
_LAST_ANSWER_S = 60
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended.

    Attributes:
        status: Of the answer; 0 if the connection broke or no answer came.
        seconds: From the time it should have left to the end of its answer.
        late_s: From the time it should have left to when it did: what the generator itself adds.
        due_s: When it should have left, from the first request's time on.
    """

    status: int
    seconds: float
    late_s: float
    due_s: float


def open_loop(
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
    """Send single texts at Poisson arrival times to ``/embed`` or ``/v1/embeddings`` on loopback; see `phases`."""
    return phases(port, texts, [(rate_per_s, seconds)], seed=seed, connections=connections, path=path, model=model)


def phases(
    port: int,
    texts: Sequence[str],
    rates: Sequence[tuple[float, float]],
    *,
    seed: int = 0,
    connections: int = 1024,
    path: str = "/embed",
    model: str = "",
) -> list[Outcome]:
    """Send at one rate after the other, each given per second and with the seconds that it lasts, without a pause.

    A process of its own sends bytes prepared beforehand. A pool of kept connections grows as needed, up to a bound;
    each carries one request at a time. Latency counts from the intended time, so a generator that falls behind makes
    the figures worse, never better.
    """
    rng = random.Random(seed)
    field = "inputs" if path == "/embed" else "input"
    extra = {"model": model, "encoding_format": "base64"} if model else {}
    head = f"POST {path} ".encode() + b"HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    messages = []
    for text in texts:
        body = json.dumps({field: text, **extra}, ensure_ascii=False).encode()
        messages.append(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    times, begin = list[float](), 0.0
    for rate_per_s, seconds in rates:
        due = begin
        for _ in range(round(rate_per_s * seconds)):
            due += rng.expovariate(rate_per_s)
            times.append(due)
        begin = max(due, begin + seconds)
    return send(port, messages, times, connections=connections)


def send(port: int, messages: Sequence[bytes], times: Sequence[float], *, connections: int = 1024) -> list[Outcome]:
    """Send whole requests in turn, each at its time in seconds from now."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_send_all, port, messages, times, connections).result()


class _Connection:
    """A kept connection: the number of the request that it carries, and what has come of the answer."""

    __slots__ = ("answer", "number", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.number = -1
        self.answer = b""

    def whole(self) -> bool:
        """Whether the answer is all there."""
        length = _LENGTH.search(self.answer)
        end = -1 if length is None else self.answer.find(b"\r\n\r\n", length.end())
        return length is not None and end >= 0 and len(self.answer) - end - 4 >= int(length[1])


def _send_all(port: int, messages: Sequence[bytes], times: Sequence[float], limit: int) -> list[Outcome]:
    gc.disable()  # a pause would be blamed on the server
    clock = time.perf_counter
    start = clock()
    n = len(times)
    statuses, ended, late = [0] * n, [0.0] * n, [0.0] * n
    events = select.epoll()
    opened: dict[int, _Connection] = {}
    idle: list[_Connection] = []
    waiting: deque[int] = deque()  # due, but every connection is busy
    following = n_ended = 0

    def end(connection: _Connection, status: int) -> None:
        nonlocal n_ended
        number = connection.number
        if number >= 0:
            statuses[number], ended[number] = status, clock() - start
            n_ended += 1
        connection.number, connection.answer = -1, b""
        if status:
            idle.append(connection)
        else:
            del opened[connection.socket.fileno()]
            connection.socket.close()
            if connection in idle:
                idle.remove(connection)

    def send(number: int) -> bool:
        nonlocal n_ended
        try:
            if not idle:
                if len(opened) >= limit:
                    return False
                connection = _Connection(port)
                opened[connection.socket.fileno()] = connection
                events.register(connection.socket, select.EPOLLIN)
            else:
                connection = idle.pop()
        except OSError:
            ended[number] = clock() - start
            n_ended += 1
            return True
        connection.number = number
        late[number] = clock() - start - times[number]
        try:
            connection.socket.sendall(messages[number % len(messages)])
        except OSError:
            end(connection, 0)
        return True

    while n_ended < n:
        now = clock() - start
        while following < n and times[following] <= now:
            waiting.append(following)
            following += 1
        while waiting and send(waiting[0]):
            waiting.popleft()
        until = times[following] if following < n else times[-1] + _LAST_ANSWER_S
        left = until - (clock() - start)
        if left < 0 and following == n:
            break
        for number, _ in events.poll(max(0.0, left)):
            connection = opened[number]
            try:
                part = connection.socket.recv(1 << 18)
            except OSError:
                part = b""
            connection.answer += part
            if not part:
                end(connection, 0)
            elif connection.whole():
                end(connection, int(connection.answer[9:12]))
    for connection in opened.values():
        connection.socket.close()
    lost = clock() - start
    return [Outcome(statuses[i], (ended[i] or lost) - times[i], late[i], times[i]) for i in range(n)]
