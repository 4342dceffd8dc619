"""Requests that leave when the answer to the one before has come: by wrk (apt install wrk), or one by one."""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONNECTIONS = 64

# Every connection takes the next text, so that all of them together send the list in order.
_WRK = """
local requests = {}
init = function()
  for body in io.lines("%s") do
    requests[#requests + 1] = wrk.format(
      "POST", "%s", {["content-type"] = "application/json", ["Host"] = "localhost"}, body)
  end
end
local i = 0
request = function()
  i = i %% #requests + 1
  return requests[i]
end
done = function(summary, latency, requests)
  io.write(string.format('\\n{"requests": %%d, "duration_us": %%d, "errors": %%d, "p50_us": %%d, "p99_us": %%d}\\n',
    summary.requests, summary.duration, summary.errors.connect + summary.errors.read + summary.errors.write +
    summary.errors.status + summary.errors.timeout, latency:percentile(50), latency:percentile(99)))
end
"""


def wrk(port: int, texts: list[str], *, seconds: float, path: str = "/embed") -> dict[str, Any]:
    """Closed loop of 64 connections over some texts, one a request: sentences/s and latencies in microseconds.

    Raises:
        SystemExit: wrk is not installed.
        RuntimeError: Not every request was answered with 200: a refusal is quicker than an answer.
    """
    program = shutil.which("wrk")
    if program is None:
        raise SystemExit("wrk is not installed: apt install wrk")
    field = "inputs" if path == "/embed" else "input"
    with tempfile.TemporaryDirectory() as folder:
        bodies, script = Path(folder, "bodies"), Path(folder, "load.lua")
        extra = {} if path == "/embed" else {"model": "served", "encoding_format": "base64"}
        bodies.write_text("".join(json.dumps({field: text, **extra}, ensure_ascii=False) + "\n" for text in texts))
        script.write_text(_WRK % (bodies, path))
        done = subprocess.run(
            [program, "-t1", f"-c{_CONNECTIONS}", f"-d{seconds:.0f}s", "--latency", "-s", str(script),
             f"http://127.0.0.1:{port}{path}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if result["errors"]:
        raise RuntimeError(
            f"{result['errors']} of {result['requests']} requests to {path} failed; see the server's log"
        )
    result["per_s"] = result["requests"] / (result["duration_us"] / 1e6)
    return result


def p50_s(call: Callable[[], object], n: int = 400) -> float:
    """Median seconds of a call, after some to warm up."""
    times = []
    for _ in range(n):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[n // 5 :])


def http_call(port: int, text: str) -> Callable[[], object]:
    """One request on a kept connection, as bare as a client can be."""
    body = json.dumps({"input": text, "encoding_format": "base64"}).encode()
    message = (
        b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(body) + body
    )
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call() -> bytes:
        connection.sendall(message)
        answer = connection.recv(1 << 20)
        while not answer.endswith(b"}"):
            answer += connection.recv(1 << 20)
        return answer

    return call


def capacity_per_s(port: int, texts: list[str]) -> float:
    """Sentences/s of 64 closed connections; errors as `wrk`."""
    return float(wrk(port, texts, seconds=6)["per_s"])
