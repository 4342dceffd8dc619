"""Memory, descriptors, threads and processes: nothing grows, nothing hangs, and what is short is said."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from m3e import Encoder
from m3e_export.texts import corpus
from tests.trust import Figure, Outcome, counted
from tests.trust.children import Died, in_child
from tests.trust.models import tiny_bundle

GROWTH_BYTES = 8 << 20
_CHILD_TIMEOUT_S = 300.0
_TEXTS = ["", "短", "今天天气真好，我们去公园散步吧。", "How do I reset my password?", "词 " * 40, "x" * 300]


def usage() -> dict[str, int]:
    """Bytes, descriptors and threads of this process.

    Bytes are its own, as proc(5) counts them: RssAnon and VmSwap. Pages of files come and go as the system likes: one
    that drops them while a harness warms up and reads them back later would make every process seem to leak. Nor does
    memory count that is free and that glibc keeps for itself, megabytes at one moment and none at the next.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    process = Path("/proc/self")
    status = dict(line.split(":", 1) for line in (process / "status").read_text(encoding="ascii").splitlines())
    return {
        "bytes": sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024,
        "descriptors": len(list((process / "fd").iterdir())),
        "threads": min(_n_threads() for _ in range(20)),
    }


def _n_threads() -> int:
    """Threads of what was collected end a moment later; those that leak stay."""
    time.sleep(0.01)
    return len(list(Path("/proc/self/task").iterdir()))


def growth(make: Callable[[], Callable[[int], object]], warm_up: int, count: int) -> dict[str, int]:
    """Call ``make()``, then what it gave ``warm_up`` times and ``count`` times; what the latter added. In a child."""
    warnings.simplefilter("ignore")
    step = make()
    for i in range(warm_up):
        step(i)
    before = usage()
    for i in counted(count):
        step(i)
    after = usage()
    return {name: after[name] - before[name] for name in before}


def open_and_close() -> Callable[[int], object]:
    """Open an encoder, use it, drop it."""
    return lambda i: Encoder(tiny_bundle(), num_threads=1 + i % 2).encode(_TEXTS)


def open_and_keep() -> Callable[[int], object]:
    """The mistake: every encoder stays."""
    kept: list[Encoder] = []

    def step(i: int) -> None:
        kept.append(Encoder(tiny_bundle(), num_threads=1))

    return step


def encode_any() -> Callable[[int], object]:
    """Encode texts of every length, now alone, now with others."""
    encoder = Encoder(tiny_bundle(), num_threads=1)
    lines = [*corpus("zh"), *corpus("en")]
    return lambda i: encoder.encode([lines[(i * 7 + k * 31) % len(lines)][: 1 + (i * 13) % 200] for k in range(i % 4)])


def encode_and_keep() -> Callable[[int], object]:
    """The mistake: a cache without bound."""
    encode, kept = encode_any(), []

    def step(i: int) -> None:
        kept.append((encode(i), bytearray(20_000)))

    return step


def open_files() -> Callable[[int], object]:
    """The mistake: a descriptor stays open."""
    encode = encode_any()

    def step(i: int) -> None:
        encode(i)
        os.open(os.devnull, os.O_RDONLY)

    return step


def measure_growth(
    step: Callable[[], Callable[[int], object]],
    leaking: Callable[[], Callable[[int], object]],
    warm_up: int,
    controls: int,
    count: int,
) -> Outcome:
    """Growth by a step, repeated; and by a leaking one."""
    tiny_bundle()

    def passed(found: dict[str, int]) -> bool:
        return found["bytes"] <= GROWTH_BYTES and found["descriptors"] <= 0 and found["threads"] <= 0

    found = in_child(growth, step, warm_up, count, timeout_s=1e6)
    caught = {
        str(broken.__name__): not passed(in_child(growth, broken, min(warm_up, 20), controls))
        for broken in (leaking, open_files)
    }
    return Outcome(
        f"{found['bytes'] / 2**20:+.1f} MB, {found['descriptors']:+d} descriptors, {found['threads']:+d} threads, "
        f"in {count:,}",
        passed(found),
        caught,
    )


def encode_lengths() -> Callable[[int], object]:
    """Encode texts of 1 to 510 tokens in no order."""
    encoder = Encoder(tiny_bundle(), num_threads=1)
    return lambda i: encoder.encode(["天" * (1 + i * 211 % 510)])


def keep_by_length() -> Callable[[int], object]:
    """The mistake: every shape that comes keeps its buffer."""
    encode, kept = encode_lengths(), {}

    def step(i: int) -> None:
        encode(i)
        kept[i % 2000] = bytearray(40_000)

    return step


def resident_after(make: Callable[[], Callable[[int], object]], few: int, many: int) -> tuple[int, int]:
    """Resident bytes after few steps, and after many more. In a child."""
    warnings.simplefilter("ignore")
    step = make()
    sizes = []
    for count in (few, many):
        for i in counted(count):
            step(i)
        sizes.append(usage()["bytes"])
    return sizes[0], sizes[1]


def measure_lengths(count: int) -> Outcome:
    """Resident memory after so many lengths against after 1,000; in a quick run after half as many."""
    tiny_bundle()
    first = min(1000, count // 2)
    few, many = in_child(resident_after, encode_lengths, first, count, timeout_s=1e6)
    kept, more = in_child(resident_after, keep_by_length, first, 2 * first)
    return Outcome(
        f"{many / few - 1:+.1%} after {count:,}", many <= 1.05 * few, {"a buffer for each shape": more > 1.05 * kept}
    )


def measure_threads(count: int) -> Outcome:
    """64 threads on one encoder, each answer against a serial one."""
    texts = [text[:200] for text in (*corpus("zh"), *corpus("en"))][::5]
    encoder = Encoder(tiny_bundle(), num_threads=2)
    serial = np.stack([encoder.encode(text) for text in texts])

    def different(encode: Callable[[list[str]], Any], count: int) -> int:
        def call(i: int) -> bool:
            some = [(i * 17 + k * 5) % len(texts) for k in range(1 + i % 5)]
            return not np.array_equal(encode([texts[k] for k in some]), serial[some])

        with ThreadPoolExecutor(64) as pool:
            return sum(pool.map(call, range(count)))

    shared = np.empty((8, serial.shape[1]), np.float32)

    def one_buffer(some: list[str]) -> Any:
        """The mistake: results go through one array of all threads."""
        shared[: len(some)] = encoder.encode(some)
        time.sleep(0.001)
        return shared[: len(some)].copy()

    wrong = different(encoder.encode, count)
    return Outcome(
        f"{wrong} of {count:,} calls", wrong == 0, {"a buffer that threads share": different(one_buffer, 800) > 0}
    )


def fork_and_use(encoder: Encoder, use: str) -> str:
    """Fork, do something with the encoder in the child, and say how that ended; empty when well."""
    expected = encoder.encode(_TEXTS)
    child = os.fork()
    if child == 0:
        code = 3
        try:
            if use == "encode":
                code = 0 if np.array_equal(encoder.encode(_TEXTS), expected) else 1
            elif use == "drop":
                del encoder
                gc.collect()
                code = 0
            elif use == "pickle":
                copy = pickle.loads(pickle.dumps(encoder))
                code = 0 if np.array_equal(copy.encode(_TEXTS), expected) else 1
            elif use == "hang":
                time.sleep(3600)
            elif use == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            else:
                code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + (2 if use == "hang" else _CHILD_TIMEOUT_S)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "" if status == 0 else f"{use}: ended with {os.waitstatus_to_exitcode(status)}"
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"{use}: hung"


def fork_many(uses: tuple[str, ...], count: int) -> list[str]:
    """Fork ``count`` times from a process with an encoder that two threads run; in a child of its own."""
    encoder = Encoder(tiny_bundle(), num_threads=2)
    findings = [fork_and_use(encoder, uses[i % len(uses)]) for i in counted(count)]
    return [finding for finding in findings if finding]


def measure_forks(count: int) -> Outcome:
    """Fork with an open encoder: encode, pickle, drop it or do nothing in the child."""
    tiny_bundle()
    found = in_child(fork_many, ("encode", "drop", "pickle", "nothing"), count, timeout_s=1e6)
    caught = {use: bool(in_child(fork_many, (use,), 1)) for use in ("hang", "crash")}
    return Outcome(f"{len(found)} of {count:,}" + (f"; first: {found[0]}" if found else ""), not found, caught)


def spawned(data: bytes) -> Any:
    """Encode with an encoder that came by pickle."""
    return pickle.loads(data).encode(_TEXTS)


def spawned_other(data: bytes) -> Any:
    """The mistake: the copy opens another precision than the one that was pickled."""
    encoder = pickle.loads(data)
    other = "fp32" if encoder.precision == "int8" else "int8"
    return Encoder(tiny_bundle(), precision=other).encode(_TEXTS)


def measure_spawn(count: int) -> Outcome:
    """Send encoders of both precisions to new processes, and compare their vectors to the last bit."""
    wrong = 0
    data, expected = b"", np.empty(0)
    for i in counted(count):
        encoder = Encoder(tiny_bundle(), precision=("fp32", "int8")[i % 2], num_threads=1 + i % 2)
        data, expected = pickle.dumps(encoder), encoder.encode(_TEXTS)
        try:
            wrong += not np.array_equal(in_child(spawned, data), expected)
        except Died:
            wrong += 1
    caught = {"another precision": not np.array_equal(in_child(spawned_other, data), expected)}
    return Outcome(f"{wrong} of {count:,}", wrong == 0, caught)


FIGURES = (
    Figure(
        "D1b", "encodes in one process: growth of resident memory, descriptors, threads", "<= 8 MB, 0, 0",
        functools.partial(measure_growth, encode_any, encode_and_keep, 600, 500),
        quick=500, long=50_000, soak=1_000_000,
    ),
    Figure(
        "D2", "resident memory after texts of every length, against after 1,000", "<= +5 %",
        measure_lengths, quick=800, long=20_000, soak=100_000,
    ),
    Figure(
        "D4", "encoders opened and dropped: growth of resident memory, descriptors, threads", "<= 8 MB, 0, 0",
        functools.partial(measure_growth, open_and_close, open_and_keep, 20, 20), quick=40, long=1000, soak=10_000,
    ),
    Figure(
        "D7", "forks with an open encoder that hang, crash or answer otherwise", "0 of 1,000",
        measure_forks, quick=24, long=1000,
    ),
    Figure("D7b", "pickles to spawned processes that answer otherwise", "0", measure_spawn, quick=2, long=50),
    Figure(
        "D8", "64 threads on one encoder: answers that differ from serial", "0 of 640,000",
        measure_threads, quick=800, long=5000, soak=640_000,
    ),
)  # fmt: skip
