"""The server with an inference process that fails on certain characters; run by the tests, known to nothing else.

With ``worker`` as its first argument it is that process.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e import Encoder, InferenceError
from m3e.server import worker
from tests import own_worker

RAISES, HANGS, NANS, DIES, SLOW = "毒", "停", "空", "亡", "慢"


class FailingEncoder(Encoder):
    """An encoder that raises, hangs, gives NaN, dies, or is slow when it meets a certain token."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._failures = {
            self.tokenize_batch([text]).input_ids[0][1]: text for text in (RAISES, HANGS, NANS, DIES, SLOW)
        }

    def embed(self, input_ids: Any) -> npt.NDArray[np.float32]:
        met = {self._failures[token] for ids in input_ids for token in ids if token in self._failures}
        if RAISES in met:
            raise InferenceError("a stand-in failure")
        if HANGS in met:
            time.sleep(3600)
        if DIES in met:
            os._exit(9)
        if SLOW in met:
            time.sleep(0.2)
        vectors = super().embed(input_ids)
        if NANS in met:
            rows = [self._failures.get(token) == NANS for ids in input_ids for token in ids[1:2]]
            vectors[np.array(rows)] = np.nan
        return vectors


if __name__ == "__main__":
    raise SystemExit(own_worker.serve(__file__, partial(worker.main, FailingEncoder)))
