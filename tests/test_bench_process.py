from __future__ import annotations

import base64
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3e import Encoder
from m3e_bench.engines.openai_http import Engine as HttpEngine
from m3e_bench.engines.padded import encode_padded
from m3e_bench.engines.worker import Worker
from m3e_bench.launch import own_roots
from m3e_bench.peers import Engine
from m3e_bench.process import EngineError, EngineProcess

TEXTS = ["今天天气真好", "How do I reset my password?", "好", ""]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[EngineProcess]:
    engine = Engine("m3e-fp32", "m3e", "m3e_runtime", None, "fp32", {"precision": "fp32"})
    started = EngineProcess(Path(sys.executable), engine.module, 1, tmp_path / "log", own_roots(engine))
    yield started
    started.close()


def load(process: EngineProcess, bundle: Path) -> None:
    options = {"precision": "fp32"}
    process.request("load", checkpoint="", folder=str(bundle), options=options, threads=1)


@pytest.fixture
def assets(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A folder as `prepare` leaves it."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "bundle").symlink_to(tiny_bundle)
    return tmp_path / "assets"


def test_an_engine_in_a_process_gives_the_vectors_that_it_gives_here(
    process: EngineProcess, assets: Path, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    load(process, assets)
    process.request("texts", name="some", texts=TEXTS)
    process.request("vectors", name="some", path=str(tmp_path / "v.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), tiny_encoder.encode(TEXTS))
    assert process.request("encode", name="some")["seconds"] > 0
    waits = process.request("latency", name="some", count=7, batch_size=2)["milliseconds"]
    assert len(waits) == 7
    assert min(waits) > 0
    memory = process.request("memory")
    assert 20e6 < memory["resident_bytes"] <= memory["peak_bytes"] < 2e9
    assert process.request("versions")["onnxruntime"]


def test_the_profile_names_the_operators(process: EngineProcess, assets: Path) -> None:
    load(process, assets)
    seconds = process.request("call", method="profile", texts=TEXTS * 4)["seconds"]
    assert {"Gemm", "MultiHeadAttention", "LayerNormalization"} <= set(seconds)
    assert all(value >= 0 for value in seconds.values())
    assert "If" not in seconds, "its branches are counted"


def test_an_engine_is_stopped_while_it_is_not_its_turn(process: EngineProcess) -> None:
    process.request("texts", name="some", texts=TEXTS)
    state = Path(f"/proc/{process.pid}/status")
    deadline = time.monotonic() + 5
    while "State:\tT" not in state.read_text():
        assert time.monotonic() < deadline, state.read_text().splitlines()[2]
    process.request("texts", name="more", texts=TEXTS)  # and goes on when it is


def test_what_an_engine_raises_is_the_answer_and_it_lives_on(process: EngineProcess, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="BundleError"):
        load(process, tmp_path / "nothing")
    process.request("texts", name="some", texts=TEXTS)


def test_a_process_that_died_is_reported(process: EngineProcess) -> None:
    process.request("texts", name="some", texts=TEXTS)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"m3e_runtime (has gone|ended)"):
        process.request("memory")
    process.close()
    process.close()


class Busy:
    """Keeps a processor for twenty milliseconds."""

    def encode(self, texts: list[str]) -> None:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass


class Slow:
    """Answers one request in ten milliseconds."""

    def encode(self, texts: list[str]) -> None:
        time.sleep(0.01)


def test_open_loop_counts_the_wait_in_line_and_closed_loop_does_not() -> None:
    worker = Worker("none")
    worker._engine = Slow()
    worker.texts("some", TEXTS)
    closed = worker.latency("some", 10, 1)["milliseconds"]
    assert 10 <= np.median(closed) < 30
    calm = worker.open_loop("some", rate=10, seconds=0.5, seed=0)
    assert calm["answered"] == 1
    assert calm["processor_ms"] < 10  # it sleeps
    assert np.median(calm["milliseconds"]) < 40
    worker._engine = Busy()
    assert worker.open_loop("some", rate=10, seconds=0.5, seed=0)["processor_ms"] >= 20
    worker._engine = Slow()
    late = worker.open_loop("some", rate=400, seconds=0.3, seed=0)  # four times what it can do
    assert late["answered"] < 0.9
    assert late["milliseconds"][-1] > 200
    assert np.all(np.asarray(late["milliseconds"]) >= 10)


def test_padded_batches_give_the_mean_over_real_tokens_in_the_order_given() -> None:
    def tokenizer(batch: list[str], **_: Any) -> dict[str, Any]:
        width = max(map(len, batch))
        ids = np.array([[ord(c) for c in text] + [0] * (width - len(text)) for text in batch])
        return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}

    def forward(inputs: dict[str, Any]) -> Any:
        return np.stack([inputs["input_ids"], inputs["input_ids"] ** 2], axis=-1).astype(np.float32)

    texts = ["ab", "c", "defgh"] * 20
    expected = [[np.mean([ord(c) for c in text]), np.mean([ord(c) ** 2 for c in text])] for text in texts]
    found = encode_padded(texts, tokenizer, forward, normalize=False)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    lengths = np.linalg.norm(encode_padded(texts, tokenizer, forward, normalize=True), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)


@pytest.fixture(params=["float", "base64"])
def server(request: pytest.FixtureRequest, tiny_encoder: Encoder) -> Iterator[str]:
    """An HTTP server of OpenAI's wire format around the real encoder."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            rows = tiny_encoder.encode(asked["input"])
            data = [
                {
                    "index": i,
                    "embedding": row.tolist() if request.param == "float" else base64.b64encode(row.tobytes()).decode(),
                }
                for i, row in enumerate(rows)
            ]
            found = self.path == "/v1/embeddings" and self.headers.get("Authorization") == "Bearer secret"
            body = json.dumps({"data": data[::-1]}).encode()
            self.send_response(200 if found else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}/v1"
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_server_gives_the_vectors_of_its_encoder(
    server: str, tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "secret")
    engine = HttpEngine(Path(), Path(), 1, server, key_variable="KEY")
    texts = [f"第{i}个句子" for i in range(70)]
    np.testing.assert_allclose(engine.encode(texts), tiny_encoder.encode(texts), rtol=1e-6)
    np.testing.assert_allclose(engine.encode(texts[:1]), tiny_encoder.encode(texts[:1]), rtol=1e-6)
    engine.close()
    refused = HttpEngine(Path(), Path(), 1, server)
    with pytest.raises(RuntimeError, match="answered 401"):
        refused.encode(["好"])
    refused.close()
