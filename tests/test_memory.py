"""Batches alone and side by side, and the memory that they may take."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3e import Encoder, InputError
from m3e.memory import runs_side_by_side, session_bytes
from m3e.session import Session

MANY = [f"今天天气真好 {i} " + "好" * (i % 37) for i in range(400)]


def test_batches_of_one_call_run_side_by_side_and_a_lone_one_on_all_threads(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch waits until another is in onnxruntime as well: one after the other they would never end."""
    encoder = Encoder(tiny_bundle, num_threads=2)
    session = encoder._running.session
    assert isinstance(session, Session)
    meeting, beside, alone = threading.Barrier(2, timeout=20), session._beside, session._alone
    taken: list[str] = []

    class Meeting:
        def run(self, *given: Any) -> Any:
            taken.append("beside")
            if len(taken) <= 4:
                meeting.wait()
            return beside.run(*given)

    class Alone:
        def run(self, *given: Any) -> Any:
            taken.append("alone")
            return alone.run(*given)

    expected = encoder.encode(MANY)
    session._beside, session._alone = Meeting(), Alone()
    monkeypatch.setattr("m3e.session._PAUSE_S", 60)
    np.testing.assert_array_equal(encoder.encode(MANY), expected)
    assert set(taken) == {"beside"}
    for apart_s, session_taken in ((60, "beside"), (0, "alone")):  # batches that just met will meet again
        monkeypatch.setattr("m3e.session._APART_S", apart_s)
        np.testing.assert_array_equal(encoder.encode(MANY[0]), expected[0])
        assert taken[-1] == session_taken


def test_no_thread_is_woken_for_a_few_tokens_after_a_pause(
    tiny_bundle: Path, tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_bytes = (tiny_bundle / tiny_encoder._running.graph.file).stat().st_size
    monkeypatch.setattr("m3e.session._BYTES_WORTH_WAKING", 5 * n_bytes)
    encoder = Encoder(tiny_bundle, num_threads=2)
    session = encoder._running.session
    assert isinstance(session, Session)
    beside, alone, taken = session._beside, session._alone, list[str]()

    def watched(name: str, of: Any) -> Any:
        def run(*given: Any) -> Any:
            taken.append(name)
            return of.run(*given)

        return types.SimpleNamespace(run=run)

    session._beside, session._alone = watched("beside", beside), watched("alone", alone)
    for n_characters, pause_s, session_taken in ((3, 0, "beside"), (3, 60, "alone"), (4, 0, "alone")):
        monkeypatch.setattr("m3e.session._PAUSE_S", pause_s)
        encoder.encode("好" * n_characters)  # and [CLS] and [SEP]
        assert taken[-1] == session_taken


def test_threads_sleep_soon_after_a_call(tiny_bundle: Path) -> None:
    """Left alone onnxruntime's would keep the processors for tens of milliseconds after each."""
    encoder = Encoder(tiny_bundle, num_threads=8)
    text = "好" * 500

    def spent_s() -> float:
        encoder.encode(text)
        encoder.encode(text)
        begun = time.process_time()
        time.sleep(0.2)
        return time.process_time() - begun

    assert min(spent_s() for _ in range(5)) < 0.02  # seven threads, 2 ms each


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_vector_does_not_depend_on_threads(tiny_bundle: Path, tiny_encoder: Encoder, threads: int) -> None:
    np.testing.assert_array_equal(
        Encoder(tiny_bundle, num_threads=threads).encode(MANY), [tiny_encoder.encode(text) for text in MANY]
    )


def test_long_texts_attend_alike_alone_and_in_any_batch(tiny_encoder: Encoder) -> None:
    """Around the length from which there is no mask; other tools pad, and get the masked kernel's rounding."""
    texts = ["好" * n for n in (*range(55, 75), 200, 200, 510)]
    together = tiny_encoder.encode(texts)
    np.testing.assert_array_equal(together, [tiny_encoder.encode(text) for text in texts])
    session = tiny_encoder._running.session
    assert isinstance(session, Session)
    padded = session.run(tiny_encoder.tokenize_batch(texts).input_ids, 512)
    np.testing.assert_allclose(padded, together, atol=2e-6)


def test_a_bound_decides_whether_the_weights_are_opened_twice(tiny_encoder: Encoder) -> None:
    model = tiny_encoder.manifest.model
    small, large = 30 << 20, 300 << 20
    assert runs_side_by_side(small, model, 2, None)
    assert not runs_side_by_side(large, model, 2, None)
    assert runs_side_by_side(large, model, 2, 2000)
    both = -(-session_bytes(small, model, 2, weights=2) >> 20)
    assert runs_side_by_side(small, model, 2, both)
    assert not runs_side_by_side(small, model, 2, both - 1)
    assert not runs_side_by_side(small, model, 64, both)
    longer = dataclasses.replace(model, max_seq_length=2 * model.max_seq_length)
    assert session_bytes(small, longer, 1, weights=1) > session_bytes(small, model, 1, weights=1)


def test_a_bound_that_no_text_fits_into_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"max_memory_mb is 1, but this graph takes \d+ MB with a text of 512 tokens"):
        Encoder(tiny_bundle, max_memory_mb=1)
    with pytest.raises(InputError, match="max_memory_mb bounds what runs on the CPU; device is 'cuda'"):
        Encoder(tiny_bundle, device="cuda", max_memory_mb=1000)
    free = Encoder(tiny_bundle, num_threads=2)
    graph_bytes = free.manifest.files[free.manifest.graphs[0].file].size_bytes
    least = -(-session_bytes(graph_bytes, free.manifest.model, 1, weights=1) >> 20)
    tight = Encoder(tiny_bundle, num_threads=2, max_memory_mb=least)
    assert (tight.batches_at_once, free.batches_at_once) == (1, 2)
    np.testing.assert_array_equal(tight.encode(MANY), free.encode(MANY))


_GROWTH = """
import sys
from pathlib import Path
import onnxruntime
from m3e import Encoder

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

Encoder(sys.argv[1], num_threads=1).encode("a")  # what the libraries take once
before = resident()
encoder = Encoder(sys.argv[2], num_threads=2, max_memory_mb=int(sys.argv[3]))
encoder.encode(["好" * n for n in range(10, 511, 25)] * 2)
print(encoder.batches_at_once, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(("max_memory_mb", "batches"), [(400, 2), (150, 1)])
def test_a_process_stays_within_the_bound(
    tiny_bundle: Path, minilm_encoder: Encoder, max_memory_mb: int, batches: int
) -> None:
    """all-MiniLM-L6-v2 in FP32, 90 MB of weights, on texts of every length."""
    given = [sys.executable, "-c", _GROWTH, str(tiny_bundle), str(minilm_encoder._folder), str(max_memory_mb)]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    at_once, growth = map(int, done.stdout.split())
    assert at_once == batches
    assert growth <= max_memory_mb << 20
