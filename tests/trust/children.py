"""Run a function in a process of its own, so that a crash or a hang is a result and not the end of the harness."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from tqdm import tqdm

R = TypeVar("R")


class Died(Exception):  # noqa: N818 (what happened to a child, as a result)
    """The process ended without an answer, or gave none in time."""


def in_child(function: Callable[..., R], *arguments: Any, timeout_s: float = 600) -> R:
    """Call a function in a new process and return its result.

    Args:
        function: Of a module; it, its arguments and its result are pickled.
        *arguments: For it.
        timeout_s: After this it counts as hanging and is killed.

    Raises:
        Died: No result.
        Exception: What the function raised.
    """
    # Harnesses multiply small matrices, where OpenBLAS' threads cost more than they bring.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            raise Died(f"no answer within {timeout_s} s")
        result, error = receiver.recv()
        process.join(60)
    except EOFError:
        process.join()
        raise Died(f"the process ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if error is not None:
        raise error
    answer: R = result
    return answer


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes, which a killed child leaves behind
    try:
        sender.send((function(*arguments), None))
    except Exception as error:
        sender.send((None, error))
