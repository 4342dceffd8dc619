"""The end and reload: nothing is lost, nothing lies."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.checkpoints import write_checkpoint
from benchmarks.server_process import Server, running, start, stop
from m3e import Encoder
from m3e_export.pipeline import convert
from tests import wire
from tests.asking import PLAIN, wait_for

if sys.platform != "linux":
    pytest.skip("processes are looked up in /proc", allow_module_level=True)

Vectors = dict[str, np.ndarray[Any, Any]]


def vectors_of(bundle: Path) -> Vectors:
    return dict(zip(PLAIN, Encoder(bundle).encode(PLAIN, normalize_embeddings=True), strict=True))


# The end


def drain_under_load(bundle: Path, rounds: int, connections: int, seconds: float) -> int:
    """Clients that keep their connections and go when told to; a request that was sent on one must be answered.

    Returns:
        How many were.
    """
    n_answered = 0
    for _ in range(rounds):
        server = start(bundle, "--drain-delay-s", "0.3")
        stop_at = time.monotonic() + seconds
        outcomes: Counter[str] = Counter()
        codes: list[int] = []
        ended = threading.Event()

        async def client(
            server: Server = server, outcomes: Counter[str] = outcomes, ended: threading.Event = ended
        ) -> None:
            message = wire.embed("今天天气真好")
            while not ended.is_set():
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                except OSError:
                    outcomes["refused"] += 1
                    return
                keep, first = True, True
                while keep and not ended.is_set():
                    try:
                        writer.write(message)
                        answer = await wire.read_answer(reader)
                    except (OSError, asyncio.IncompleteReadError):
                        # A new connection that only the kernel had taken was never the server's.
                        outcomes["refused" if first else "lost"] += 1
                        break
                    first = False
                    outcomes[str(answer.status)] += 1
                    keep = not answer.closes
                writer.close()

        async def clients(client: Any = client) -> None:
            await asyncio.gather(*(client() for _ in range(connections)))

        thread = threading.Thread(target=asyncio.run, args=(clients(),))
        thread.start()
        time.sleep(max(0.0, stop_at - time.monotonic()))
        codes.append(stop(server))
        ended.set()
        thread.join()
        assert codes == [0]
        assert outcomes["lost"] == 0, outcomes
        assert outcomes["200"] > connections
        assert set(outcomes) <= {"200", "503", "refused", "lost"}
        n_answered += outcomes["200"]
    return n_answered


def test_no_accepted_request_fails_when_the_server_is_told_to_end(tiny_bundle: Path) -> None:
    drain_under_load(tiny_bundle, rounds=1, connections=16, seconds=0.8)


@pytest.mark.long
def test_no_accepted_request_fails_in_fifty_ends(
    tiny_bundle: Path, cases: Callable[[int], int], record_property: Callable[[str, str], None]
) -> None:
    n = cases(50)
    n_answered = drain_under_load(tiny_bundle, rounds=n, connections=32, seconds=1.0)
    record_property("C9", f"0 in {n} ends, {n_answered:,} requests answered")


def test_readiness_goes_before_the_service(tiny_bundle: Path) -> None:
    server = start(tiny_bundle, "--drain-delay-s", "0.5")
    try:
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_until(False, 1) < 0.2
        reply = server.post("/embed", {"inputs": "a"})
        assert (reply.status, reply.headers["connection"]) == (200, "close")
    finally:
        assert stop(server) == 0


# Reload


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with other weights."""
    folder = tmp_path_factory.mktemp("other")
    convert(str(write_checkpoint(folder / "m3e-tiny", seed=1)), folder / "tiny", with_token_embeddings=True)
    return folder / "tiny"


def reloaded(server: Server, result: str, times: int) -> bool:
    return server.metrics()[f"m3e_reloads_total[('result', '{result}')]"] == times


@pytest.mark.parametrize("swaps", [pytest.param(2, id="few"), pytest.param(50, id="many", marks=pytest.mark.long)])
def test_a_bundle_is_swapped_while_requests_run_and_a_damaged_one_is_refused(
    swaps: int, token_bundle: Path, other_bundle: Path, tmp_path: Path,
    cases: Callable[[int], int], record_property: Callable[[str, str], None],
) -> None:  # fmt: skip
    """Two bundles in turn, every tenth time and the last a damaged one; each answer is wholly one bundle's."""
    n = cases(swaps)
    damaged = Path(shutil.copytree(token_bundle, tmp_path / "damaged"))
    with (damaged / "tokenizer.json").open("r+b") as file:
        file.write(b" ")
    sides = [(bundle, vectors_of(bundle)) for bundle in (token_bundle, other_bundle)]
    folder = tmp_path / "served"

    def serve(bundle: Path) -> None:
        (tmp_path / "next").symlink_to(bundle)
        (tmp_path / "next").replace(folder)

    serve(token_bundle)
    with running(folder) as server, ThreadPoolExecutor(3) as pool:
        done = threading.Event()

        def of(texts: list[str]) -> set[int]:
            """The sides that gave these texts' vectors."""
            reply = server.post("/v1/embeddings", {"input": texts})
            assert reply.status == 200, reply
            rows = [np.array(item["embedding"], dtype=np.float32) for item in reply.json["data"]]
            pairs = list(zip(texts, rows, strict=True))
            return {i for i, (_, known) in enumerate(sides) if all(np.array_equal(known[t], row) for t, row in pairs)}

        def load() -> int:
            n_answers = 0
            while not done.is_set():
                assert len(of(random.sample(PLAIN, 3))) == 1
                assert server.post("/embed_all", {"inputs": PLAIN[0]}).status == 200
                n_answers += 2
            return n_answers

        loads = [pool.submit(load) for _ in range(3)]
        counts, current = Counter({"swapped": 0, "refused": 0}), 0
        for i in range(1, n + 1):
            worker = server.worker_pid()
            result = "refused" if i % 10 == 0 or i == n else "swapped"
            if result == "swapped":
                current = 1 - current
            serve(damaged if result == "refused" else sides[current][0])
            counts[result] += 1
            server.process.send_signal(signal.SIGHUP)
            wait_for(functools.partial(reloaded, server, result, counts[result]), 60)
            assert of(PLAIN[:2]) == {current}
            assert (server.worker_pid() != worker) is (result == "swapped")
        done.set()
        n_answers = sum(item.result() for item in loads)
        assert server.ready()
    record_property("C12", f"0 of {n_answers:,} answers in {n:,} swaps, {counts['refused']} of them refused")


def test_a_worker_that_is_replaced_does_not_bring_another_bundle(
    token_bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    """A folder was given another bundle, nobody said reload, and the process died: no answer instead of a mixed one."""
    folder = tmp_path / "served"
    folder.symlink_to(token_bundle)
    known = [vectors_of(bundle)[PLAIN[0]] for bundle in (token_bundle, other_bundle)]
    with running(folder) as server:

        def answer() -> Any:
            return np.array(server.post("/v1/embeddings", {"input": PLAIN[0]}).json["data"][0]["embedding"], np.float32)

        np.testing.assert_array_equal(answer(), known[0])
        (tmp_path / "next").symlink_to(other_bundle)
        (tmp_path / "next").replace(folder)
        np.testing.assert_array_equal(answer(), known[0])
        os.kill(server.worker_pid(), signal.SIGKILL)
        server.wait_until(False)
        for _ in range(3):
            reply = server.post("/v1/embeddings", {"input": PLAIN[0]})
            assert (reply.status, reply.json["error"]["code"]) == (503, "not_ready")
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(True)
        np.testing.assert_array_equal(answer(), known[1])
