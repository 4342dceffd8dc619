"""Inference in a process of its own, because a call into onnxruntime that hangs cannot be ended any other way.

The service talks to it over one socket for each batch in flight. When a call takes far longer than the slowest batch
of the warm-up did, or the process dies, it is replaced; whoever had a batch in it gets `WorkerLostError`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.encoder import Encoder
from m3e.errors import ClosedError, InferenceError, M3EError, StartError, WorkerLostError

Float32Array = npt.NDArray[np.float32]

log = logging.getLogger("m3e.server")

# A call may take this much longer than the slowest batch of the warm-up; never less than the floor, because a busy
# machine stops any process for a while.
_PATIENCE_FACTOR = 10
# A service says that it is not ready before it gives a call up.
_DOUBT_FACTOR = 4
_PATIENCE_FLOOR_S = 0.75
_START_TIMEOUT_S = 120.0
_RETRY_S = 0.5
# Where processors are short the service goes before inference: what it does for a request is short, and a refusal that
# waits its turn behind batches comes too late.
_NICENESS = 5
_SENTENCES, _TOKENS = b"s", b"t"
_VECTORS, _ERROR = b"v", b"e"

DEFAULT_COMMAND = (sys.executable, "-P", "-m", "m3e.server.worker")


class Worker:
    """The service's end: starts the process, hands it batches, watches it and replaces it.

    Args:
        folder: The bundle.
        precision: As for `Encoder`.
        device: As for `Encoder`.
        threads: For inference on the CPU.
        max_batch_tokens: Size of the largest batch; 0 for what the device is fastest with.
        digest: Of the bundle's manifest. The folder may hold another bundle by the time that a process is replaced.
        command: Program that runs `main`; tests give one whose encoder fails.

    Attributes:
        precision: Of the graph that runs.
        device: What it runs on.
        max_batch_tokens: Size of the largest batch.
        mixed: Whether texts of several widths may share a batch.

    Raises:
        StartError: The process could not open the bundle; the message says why.
    """

    def __init__(
        self,
        folder: str,
        *,
        precision: str,
        device: str,
        threads: int,
        max_batch_tokens: int,
        digest: str,
        command: Sequence[str] = DEFAULT_COMMAND,
    ) -> None:
        self._command = [*command, folder, precision]
        self._folder, self._digest, self._threads = folder, digest, threads
        # One socket for each batch in flight, of which a card has two, and one for token vectors.
        self._n_channels = max(threads, 2) + 1
        self._starting = threading.Lock()
        self._side = threading.Lock()
        self._generation = 0
        self._up = False
        self._closed = False
        self._failed_at = 0.0
        self.n_restarts = 0
        self._wanted_device = device
        self.precision = self.device = ""
        self.max_batch_tokens, self.mixed, self._batches_at_once = max_batch_tokens, False, 0
        self.patience_s = self.doubt_s = _START_TIMEOUT_S
        self._since = [0.0] * self._n_channels
        self._process: subprocess.Popen[bytes]
        self._channels: list[Connection[bytes, bytes]]
        self._start()

    @property
    def alive(self) -> bool:
        """Whether a process is there, and no call has been under way for suspiciously long."""
        oldest = min((since for since in self._since if since), default=float("inf"))
        return self._up and self._process.poll() is None and time.monotonic() - oldest < self.doubt_s

    def embedders(self) -> list[Callable[[list[list[int]]], Float32Array]]:
        """One function for each batch that may be in flight; see `m3e.scheduler.Scheduler`."""

        def through(channel: int) -> Callable[[list[list[int]]], Float32Array]:
            return lambda input_ids: self._call(channel, _SENTENCES, input_ids)

        return [through(channel) for channel in range(self._batches_at_once)]

    def embed_tokens(self, input_ids: list[int]) -> Float32Array:
        """Run one text for its token vectors, float32 (tokens, hidden_size)."""
        with self._side:
            return self._call(self._n_channels - 1, _TOKENS, [input_ids])

    def check(self) -> None:
        """Start the process again if it was lost and nothing has asked for it since."""
        generation = self._generation  # first, or a process that another thread has just started would be lost
        if self._up and self._process.poll() is not None:
            self._lose(generation)
        if not self._up:
            with contextlib.suppress(M3EError):
                self._start_again()

    def close(self) -> None:
        """End the process."""
        self._closed = True
        self._up = False
        self._kill()

    def _call(self, channel: int, kind: bytes, input_ids: list[list[int]]) -> Float32Array:
        if self._closed:
            raise ClosedError("the inference process was ended")
        if not self._up:
            self._start_again()
        generation, connection = self._generation, self._channels[channel]
        lengths = [len(ids) for ids in input_ids]
        message = np.fromiter((len(lengths), *lengths, *(i for ids in input_ids for i in ids)), dtype=np.int32)
        self._since[channel] = time.monotonic()
        try:
            connection.send_bytes(kind + message.tobytes())
            answer = connection.recv_bytes()
        except (OSError, EOFError) as error:
            hung = isinstance(error, BlockingIOError)
            self._since[channel] = 0.0
            if self._closed:
                raise ClosedError("the inference process was ended") from error
            self._lose(generation)
            raise WorkerLostError(
                f"the inference process {'did not answer' if hung else 'died'}; it is being replaced"
            ) from error
        self._since[channel] = 0.0
        if answer[:1] == _ERROR:
            raise InferenceError("the model failed on a text")
        vectors = np.frombuffer(answer, dtype=np.float32, offset=4)
        return vectors.reshape(len(input_ids) if kind == _SENTENCES else lengths[0], -1)

    def _lose(self, generation: int) -> None:
        """End the process of this generation, unless another thread has.

        The next call starts another, or `check`: whoever hears that a text failed need not wait for that.
        """
        with self._starting:
            if generation == self._generation and self._up:
                self._up = False
                self._kill()

    def _start_again(self) -> None:
        with self._starting:
            if self._up or self._closed:
                return
            if time.monotonic() - self._failed_at < _RETRY_S:
                raise StartError("the inference process could not be started a moment ago")
            self.n_restarts += 1
            try:
                self._start()
            except StartError as error:
                self._failed_at = time.monotonic()
                log.error("the inference process could not be replaced: %s", error)
                raise
            if self._closed:  # meanwhile; whoever closed it saw only the process before
                self.close()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for channel in self._channels:
            channel.close()

    def _start(self) -> None:
        try:
            self._spawn()
            self._hear()
        except OSError as error:  # no descriptors, processes or memory left: to be tried again, as any other failure
            raise StartError(f"the inference process cannot be started: {error}") from error
        self._generation += 1
        self._up = True

    def _hear(self) -> None:
        """Wait until the process has opened the bundle, and take over what it says."""
        _set_patience(self._channels[0], _START_TIMEOUT_S)
        try:
            hello: dict[str, Any] = json.loads(self._channels[0].recv_bytes())
        except (OSError, EOFError) as error:
            self._process.kill()
            raise StartError("the inference process ended before it had opened the bundle") from error
        if "error" in hello:
            self._process.wait()
            raise StartError(str(hello["error"]))
        if hello["digest"] != self._digest:
            self._process.kill()
            raise StartError(f"{self._folder!r} holds another bundle than the one served; reload it with SIGHUP")
        self.precision, self.device = hello["precision"], hello["device"]
        if self._wanted_device == "auto":
            self._wanted_device = self.device  # its successors run there too, or not at all
        self.max_batch_tokens, self.mixed = hello["max_batch_tokens"], hello["mixed"]
        self._batches_at_once = hello["batches_at_once"]
        self.patience_s = max(_PATIENCE_FLOOR_S, _PATIENCE_FACTOR * hello["slowest_batch_s"])
        self.doubt_s = max(_PATIENCE_FLOOR_S, _DOUBT_FACTOR * hello["slowest_batch_s"])
        for channel in self._channels:
            _set_patience(channel, self.patience_s)

    def _spawn(self) -> None:
        pairs = [socket.socketpair() for _ in range(self._n_channels)]
        theirs = [pair[1].fileno() for pair in pairs]
        numbers = (self._threads, self.max_batch_tokens, *theirs)
        command = [*self._command, self._wanted_device, *map(str, numbers)]
        self._process = subprocess.Popen(command, pass_fds=theirs, stdin=subprocess.DEVNULL)
        self._channels = []
        for ours, other in pairs:
            other.close()
            self._channels.append(Connection(ours.detach()))


def _set_patience(channel: Connection[bytes, bytes], seconds: float) -> None:
    """Have the kernel end a read after so long, by a BlockingIOError; `Connection.poll` makes a selector each time."""
    whole = int(seconds)
    timeval = struct.pack("@ll", whole, int((seconds - whole) * 1e6))  # seconds, microseconds: setsockopt(2)
    with socket.socket(fileno=os.dup(channel.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)


def main(open_encoder: Callable[..., Encoder] = Encoder, arguments: Sequence[str] | None = None) -> None:
    """Be the process: open the bundle, warm up, then answer until the service is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("precision")
    parser.add_argument("device")
    parser.add_argument("threads", type=int)
    parser.add_argument("max_batch_tokens", type=int)
    parser.add_argument("sockets", type=int, nargs="+")
    parsed = parser.parse_args(arguments)
    # The service decides when this process ends; a signal to the whole group must not cut its batches short.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICENESS)
    channels = [Connection(number) for number in parsed.sockets]
    try:
        encoder = open_encoder(
            parsed.folder, precision=parsed.precision, device=parsed.device, num_threads=parsed.threads
        )
        max_batch_tokens = parsed.max_batch_tokens or encoder.max_shared_batch_tokens
        hello = {
            "digest": encoder.manifest.digest,
            "precision": encoder.precision,
            "device": encoder.device,
            "max_batch_tokens": max_batch_tokens,
            "mixed": encoder.mixes_widths,
            "batches_at_once": encoder.batches_at_once,
            "slowest_batch_s": _warm_up(encoder, max_batch_tokens),
        }
    except Exception as error:
        channels[0].send_bytes(json.dumps({"error": str(error)}).encode())
        return
    channels[0].send_bytes(json.dumps(hello).encode())
    threads = [threading.Thread(target=_answer, args=(encoder, channel), daemon=True) for channel in channels]
    for thread in threads:
        thread.start()
    threads[0].join()  # its socket closes when the service is gone


def _warm_up(encoder: Encoder, max_batch_tokens: int) -> float:
    """Run full batches of several widths, alone and side by side; seconds of the slowest, the widest run again."""
    widest = encoder.max_seq_length
    ids = encoder.tokenize_batch(["预热"]).input_ids[0]
    most = encoder.batches_at_once
    with ThreadPoolExecutor(most) as pool:

        def slowest(width: int) -> float:
            batch = [[ids[0], *([ids[1]] * (width - 2)), ids[-1]]] * max(1, max_batch_tokens // width)
            runs = ([batch] * at_once for at_once in sorted({1, most}))
            return max(seconds for run in runs for seconds in pool.map(_time_batch, [encoder] * len(run), run))

        for width in (4, 16, 64, widest):
            slowest(width)
        return slowest(widest)


def _time_batch(encoder: Encoder, batch: list[list[int]]) -> float:
    started = time.monotonic()
    encoder.embed(batch)
    return time.monotonic() - started


def _answer(encoder: Encoder, channel: Connection[bytes, bytes]) -> None:
    with contextlib.suppress(EOFError, OSError):  # the service is gone
        while True:
            message = channel.recv_bytes()
            try:
                vectors = _run(encoder, message[:1], np.frombuffer(message[1:], dtype=np.int32).tolist())
                # Four bytes before the floats keep them aligned.
                answer = _VECTORS + b"\0\0\0" + np.ascontiguousarray(vectors, dtype=np.float32).tobytes()
            except Exception:
                answer = _ERROR
            channel.send_bytes(answer)


def _run(encoder: Encoder, kind: bytes, numbers: list[int]) -> Float32Array:
    n = numbers[0]
    start = 1 + n
    input_ids = []
    for length in numbers[1 : 1 + n]:
        input_ids.append(numbers[start : start + length])
        start += length
    return encoder.embed_tokens(input_ids[0]) if kind == _TOKENS else encoder.embed(input_ids)


if __name__ == "__main__":
    main()
