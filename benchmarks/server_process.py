"""A real server in a process of its own, on loopback."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

import m3e

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-c", "from m3e.cli.main import main; raise SystemExit(main())", "serve")
FAILING = (sys.executable, str(ROOT / "tests" / "failing_server.py"))


@dataclass
class Reply:
    """An answer, read whole; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


@dataclass
class Server:
    """A running server, and what it has logged."""

    process: subprocess.Popen[bytes]
    port: int
    log: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, content: Any = None, headers: dict[str, str] | None = None, timeout: float = 30
    ) -> Reply:
        """Send a request on a connection of its own; content that is not bytes goes as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            body = content if isinstance(content, (bytes, type(None))) else json.dumps(content).encode()
            sent = {"content-type": "application/json"} if body is not None else {}
            connection.request(method, path, body, {**sent, **(headers or {})})
            reply = connection.getresponse()
            return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def post(self, path: str, content: Any, **named: Any) -> Reply:
        """POST; see `request`."""
        return self.request("POST", path, content, **named)

    def get(self, path: str, **named: Any) -> Reply:
        """GET; see `request`."""
        return self.request("GET", path, **named)

    def metrics(self) -> dict[str, float]:
        """What /metrics says, by the name and the labels of each series."""
        return {
            sample.name + (str(sorted(sample.labels.items())) if sample.labels else ""): sample.value
            for family in text_string_to_metric_families(self.get("/metrics").body.decode())
            for sample in family.samples
        }

    def ready(self) -> bool:
        """Whether it says that it is."""
        return self.get("/health/ready").status == 200

    def wait_until(self, wanted: bool, seconds: float = 20) -> float:
        """Wait for readiness, or its loss; the seconds that it took."""
        started = time.monotonic()
        while self.ready() is not wanted:
            assert time.monotonic() - started < seconds, "".join(self.log)
            time.sleep(0.01)
        return time.monotonic() - started

    def worker_pid(self) -> int:
        """The inference process: the server's only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children += (task / "children").read_text().split()
        return int(next(iter(set(children))))

    def resident_kb(self, *, peak: bool = False) -> int:
        """Resident memory of the server and its worker; see `resident_kb`."""
        return sum(resident_kb(pid, peak=peak) for pid in (self.process.pid, self.worker_pid()))

    def forget_peaks(self) -> None:
        """See `forget_peak`."""
        for pid in (self.process.pid, self.worker_pid()):
            forget_peak(pid)


def resident_kb(pid: int, *, peak: bool = False) -> int:
    """Resident memory of a process, now or at its highest (Linux: proc(5), VmRSS and VmHWM)."""
    match = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1])


def forget_peak(pid: int) -> None:
    """Let a process's highest resident memory be that of now (Linux: proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def start(*arguments: object, command: tuple[str, ...] = COMMAND, ready: bool = True, **environment: str) -> Server:
    """Start a server on a free port and, unless told otherwise, wait until it is ready."""
    path = os.pathsep.join([str(Path(m3e.__file__).parents[1]), str(ROOT)])
    variables = {name: value for name, value in os.environ.items() if not name.startswith("M3E_")}
    process = subprocess.Popen(
        [*command, *map(str, arguments), "--port", "0"],
        env={**variables, "PYTHONPATH": path, **environment}, stderr=subprocess.PIPE,
    )  # fmt: skip
    server = Server(process, 0)
    assert process.stderr is not None
    for line in process.stderr:
        server.log.append(line.decode())
        if (match := re.search(rb"listening on http://.*:(\d+)", line)) is not None:
            server.port = int(match[1])
            break
    stderr = process.stderr

    def follow() -> None:
        for line in stderr:
            server.log.append(line.decode(errors="replace"))

    threading.Thread(target=follow, daemon=True).start()
    assert server.port, "".join(server.log)
    if ready:
        server.wait_until(True, 60)
    return server


def stop(server: Server) -> int:
    """End a server as systemd would; its exit code."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(30)
    if server.process.stderr is not None:
        server.process.stderr.close()
    return code


@contextlib.contextmanager
def running(*arguments: object, **named: Any) -> Iterator[Server]:
    """A server for the time of a block."""
    server = start(*arguments, **named)
    try:
        yield server
    finally:
        stop(server)
