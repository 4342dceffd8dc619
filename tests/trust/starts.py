"""A server that starts: not ready before it has proven itself, and how much of that is hashing."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.server_process import COMMAND, Server, start, stop
from m3e import Encoder, bundle
from m3e.manifest import Manifest, decode_array, encode_array
from tests.trust import Figure, Outcome, counted
from tests.trust.careless_server import careless
from tests.trust.children import in_child
from tests.trust.hostile import replace_manifest
from tests.trust.models import small_bundle, tiny_bundle

_TEXT = "今天天气真好"
_LARGEST_SHARE = 0.1


def with_other_golden_vectors(manifest: Manifest) -> Manifest:
    """What a machine that computes other vectors would find: the golden ones are not those of the graph."""
    shape = (len(manifest.golden), manifest.model.embedding_dim)
    return dataclasses.replace(
        manifest,
        graphs=tuple(
            dataclasses.replace(
                graph, golden_embeddings=encode_array(decode_array(graph.golden_embeddings, shape)[:, ::-1].copy())
            )
            for graph in manifest.graphs
        ),
    )


def proves_itself(folder: Path, expected: list[float] | None, command: tuple[str, ...] = COMMAND) -> bool:
    """Start a server and ask it again and again whether it is ready.

    Args:
        folder: A bundle.
        expected: The vector that a ready server gives; None where it must never be ready, and end with an error.
        command: What starts it.
    """
    server = start(folder, command=command, ready=False)
    try:
        while server.process.poll() is None:
            if _ready(server):
                reply = server.post("/embed", {"inputs": _TEXT})
                return reply.status == 200 and expected is not None and reply.json == [expected]
        return expected is None and server.process.returncode == 1
    finally:
        stop(server)


def _ready(server: Server) -> bool:
    try:
        return server.ready()
    except OSError:  # it has just ended
        return False


def measure_starts(count: int) -> Outcome:
    """So many starts, every other one with golden vectors that the graph does not give."""
    vector = Encoder(tiny_bundle()).encode(_TEXT, normalize_embeddings=True)
    expected = [float(str(value)) for value in vector]  # as in JSON: the shortest digits of each float32
    with tempfile.TemporaryDirectory() as place:
        wrong = Path(shutil.copytree(tiny_bundle(), Path(place, "wrong")))
        replace_manifest(wrong, with_other_golden_vectors)
        bad = sum(
            not (proves_itself(wrong, None) if i % 2 else proves_itself(tiny_bundle(), expected))
            for i in counted(count)
        )
        command = careless("ready at once")
        caught = {
            "ready at once": not proves_itself(tiny_bundle(), expected, command),
            "ready at once, with wrong golden vectors": not proves_itself(wrong, None, command),
        }
    return Outcome(f"{bad} of {count}, {count // 2} of them with wrong golden vectors", bad == 0, caught)


def load_and_hash_s(folder: Path, precision: str, times: int) -> tuple[float, float]:
    """Seconds to open a bundle that is not in the page cache, and those of them that SHA-256 took. In a child.

    Args:
        folder: The bundle.
        precision: Which graph.
        times: How often each file is hashed; more than once is the mistake.
    """
    hashing_s = 0.0

    def sha256(data: bytes) -> Any:
        nonlocal hashing_s
        begin = time.perf_counter()
        for _ in range(times):
            digest = hashlib.sha256(data)
        hashing_s += time.perf_counter() - begin
        return digest

    bundle.hashlib = SimpleNamespace(sha256=sha256)  # type: ignore[assignment, attr-defined]
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.perf_counter()
    Encoder(folder, precision=precision)
    return time.perf_counter() - begin, hashing_s


def measure_hashing(count: int) -> Outcome:
    """So many cold loads of each graph, each in a process of its own; imports do not count."""

    def share(precision: str, times: int = 1, loads: int = count) -> tuple[float, float]:
        """Median share, and median seconds."""
        found = [in_child(load_and_hash_s, small_bundle(), precision, times) for _ in range(loads)]
        return statistics.median(part / whole for whole, part in found), statistics.median(whole for whole, _ in found)

    shares = {precision: share(precision) for precision in ("fp32", "int8")}
    return Outcome(
        "; ".join(f"{name} {part:.1%} of {seconds:.2f} s" for name, (part, seconds) in shares.items())
        + f", medians of {count}",
        all(part <= _LARGEST_SHARE for part, _ in shares.values()),
        {"every file hashed ten times": share("fp32", 10, 1)[0] > _LARGEST_SHARE},
    )


FIGURES = (
    Figure(
        "C10", "starts that said ready before the golden texts were right", "0 of 200",
        measure_starts, quick=4, long=6, soak=200,
    ),
    Figure(
        "E6", "share of hashing in a cold load of M3E-small's shape", "<= 10 %", measure_hashing, long=5, soak=15,
    ),
)  # fmt: skip
