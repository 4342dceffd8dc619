"""Batches on a card, on a stand-in of it: memory, layout, plans, CUDA graphs, the service."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.server_process import running as serving
from m3e import (
    Encoder,
    InferenceError,
    StartError,
    gpu,
    providers,
)
from m3e.cuda_graphs import BUCKETS
from m3e.cuda_session import CudaSession, batch_tokens
from m3e.feeds import pack, rectangle
from m3e.gpu import PinnedBuffer
from m3e.manifest import Model
from m3e.plan import plan_sorted
from tests.gpu_standin import StandInSession, standin

GPU_SERVER = (sys.executable, str(Path(__file__).with_name("gpu_server.py")))

__all__ = ["standin"]


def test_pinned_memory_is_registered_and_released() -> None:
    calls = []

    def register(address: ctypes.c_void_p, size: ctypes.c_size_t, flags: int) -> int:
        calls.append(("register", address.value, size.value))
        return 0

    def unregister(address: ctypes.c_void_p) -> int:
        calls.append(("unregister", address.value, 0))
        return 0

    buffer = PinnedBuffer(4096, types.SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister))
    shapes = [((3, 5), np.dtype(np.int32)), ((7,), np.dtype(np.float32))]
    assert gpu.size_of(shapes) == 512
    first, second = buffer.views(shapes)
    first[...], second[...] = 1, 2
    assert (first.sum(), second.sum()) == (15, 14)
    assert first.ctypes.data == calls[0][1]
    assert first.ctypes.data % mmap.PAGESIZE == 0  # no other lock holds its pages
    assert second.ctypes.data % 256 == first.ctypes.data % 256
    del buffer
    assert [name for name, *_ in calls] == ["register", "unregister"]
    with pytest.raises(StartError, match=r"cannot lock 64 bytes.*error 2"):
        PinnedBuffer(64, types.SimpleNamespace(cudaHostRegister=lambda *_: 2, cudaHostUnregister=unregister))


def test_memory_is_pinned_for_the_card_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    cards: list[int] = []

    def load(name: str) -> Any:
        loaded.append(name)
        return types.SimpleNamespace(cudaSetDevice=cards.append)

    monkeypatch.setattr(providers, "import_onnxruntime", lambda: types.SimpleNamespace(cuda_version="13.0"))
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert providers.cuda_runtime(3) is not None
    assert (loaded, cards) == (["libcudart.so.13"], [3])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_pinned_memory_stays_where_it_is_after_a_fork() -> None:
    """A private page would be copied at the first write, and the card go on reading the old one."""
    (view,) = PinnedBuffer(4096, None).views([((4096,), np.dtype(np.uint8))])
    view[:] = 1
    child = os.fork()
    if child == 0:
        view[:] = 2
        os._exit(0)
    os.waitpid(child, 0)
    assert (view == 2).all()


IDS = [[2, 300, 3], [2, 8, 9, 10, 3], [2, 3]]


def test_packing() -> None:
    feeds = pack(IDS)
    assert feeds["input_ids"].tolist() == [2, 300, 3, 2, 8, 9, 10, 3, 2, 3]
    assert feeds["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1]
    assert feeds["cumulative_sequence_length"].tolist() == [0, 3, 8, 10]
    # The example of the operator's own documentation is laid out in the same way.
    assert feeds["token_offset"].tolist() == [[0, 1, 2, 5, 6], [7, 8, 9, 10, 11], [3, 4, 12, 13, 14]]
    assert {array.dtype for array in feeds.values()} == {np.dtype(np.int32)}
    assert pack([[1], [2, 3], [4, 5, 6, 7]], 4)["token_offset"].ravel().tolist() == [
        0, 4, 5, 8, 9, 10, 11, 1, 2, 3, 6, 7,
    ]  # fmt: skip


def test_rectangles() -> None:
    feeds = rectangle(IDS)
    assert feeds["input_ids"].tolist() == [[2, 300, 3, 0, 0], [2, 8, 9, 10, 3], [2, 3, 0, 0, 0]]
    assert feeds["lengths"].tolist() == [3, 5, 2]
    assert {array.dtype for array in feeds.values()} == {np.dtype(np.int32)}


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_buckets_have_one_shape_whatever_is_in_them(bucket: Any) -> None:
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(200):
        lengths = rng.integers(1, bucket.width + 1, rng.integers(1, bucket.rows + 1))
        ids = [[7] * int(length) for length in lengths]
        if not bucket.fits(ids):
            continue
        feeds = bucket.feeds(ids)
        shapes.add(tuple((name, array.shape) for name, array in feeds.items()))
        spans = np.diff(feeds["cumulative_sequence_length"])
        assert spans.min() >= 1
        assert spans[: len(ids)].tolist() == lengths.tolist()
        assert feeds["position_ids"].max() < bucket.width
        assert sorted(feeds["token_offset"].ravel()) == list(range(feeds["token_offset"].size))
    assert len(shapes) == 1
    assert not bucket.fits([[7] * (bucket.width + 1)])
    assert not bucket.fits([[7]] * (bucket.rows + 1))


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")
def test_cuda_gives_the_cpus_vectors(gpu_bundle: Path, standin: list[StandInSession], sentences: list[str]) -> None:
    texts = sentences[::5]
    encoder = Encoder(gpu_bundle, device="cuda")
    assert (encoder.device, encoder.precision) == ("cuda", "fp16")
    eager, capturing = standin
    assert (len(eager.captured), len(capturing.captured)) == (0, len(BUCKETS))
    exact = unit(Encoder(gpu_bundle).encode(texts))
    assert np.abs(unit(encoder.encode(texts)) - exact).max() < 2e-3
    alone = unit(np.stack([encoder.encode(text) for text in texts[:40]]))
    assert np.abs(alone - exact[:40]).max() < 2e-3
    assert np.abs(unit(encoder.encode(texts, batch_size=3)) - exact).max() < 2e-3


def test_threads_of_the_caller_never_run_the_session_that_captures(
    gpu_bundle: Path, standin: list[StandInSession], sentences: list[str]
) -> None:
    """Its replays write to memory that onnxruntime holds for free, so nothing else may run there at that moment."""
    encoder = Encoder(gpu_bundle, device="cuda")
    calls: list[Any] = [text for text in sentences if len(text) < 60][:24]
    calls[::3] = [[*calls[:40], "长" * 300]] * len(calls[::3])  # too much for any bucket
    exact = [Encoder(gpu_bundle).encode(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for vectors, expected in zip(pool.map(encoder.encode, calls), exact, strict=True):
            assert np.abs(unit(vectors) - unit(expected)).max() < 2e-3
    eager, capturing = standin
    assert len(capturing.threads) == 1
    assert not capturing.threads & eager.threads
    assert (eager.options["enable_cuda_graph"], capturing.options["enable_cuda_graph"]) == ("0", "1")


def test_fp32_on_cuda_is_the_cpus_graph(gpu_bundle: Path, standin: list[StandInSession]) -> None:
    encoder = Encoder(gpu_bundle, device="cuda", precision="fp32")
    assert set(standin[0].inputs) == {"input_ids", "attention_mask"}
    assert standin[0].options["enable_cuda_graph"] == "0"
    np.testing.assert_allclose(encoder.encode(["你好", "a"]), Encoder(gpu_bundle).encode(["你好", "a"]), atol=1e-5)


def test_cuda_graphs_that_cannot_be_captured_are_told_of(
    gpu_bundle: Path, standin: list[StandInSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandInSession, "refuse_capture", True)
    with pytest.warns(RuntimeWarning, match="CUDA graphs are off.*capture is not possible"):
        encoder = Encoder(gpu_bundle, device="cuda")
    ran = len(standin[0].threads), len(standin[1].threads)
    assert encoder.encode("你好").shape == (64,)
    assert ran == (1, 1)  # the canary; the attempt to capture
    assert threading.get_ident() in standin[0].threads


def test_many_windows_are_put_back_in_order(
    gpu_bundle: Path, standin: list[StandInSession], monkeypatch: pytest.MonkeyPatch, sentences: list[str]
) -> None:
    monkeypatch.setattr(CudaSession, "window", 7)
    texts = [text for text in sentences if len(text) < 60][:60]
    encoder = Encoder(gpu_bundle, device="cuda")
    exact = unit(Encoder(gpu_bundle).encode(texts))
    assert np.abs(unit(encoder.encode(texts)) - exact).max() < 2e-3
    with pytest.warns(UserWarning, match=r"2 of 20 texts are longer.*the first is text 8, with at least 602 tokens"):
        encoder.encode([*texts[:8], "长" * 600, *texts[:10], "长" * 700])


def test_a_failure_in_a_batch_is_an_inference_error(
    gpu_bundle: Path, standin: list[StandInSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(gpu_bundle, device="cuda")
    monkeypatch.setattr(StandInSession, "run_with_iobinding", lambda *_: 1 / 0)
    with pytest.raises(InferenceError, match="failed on a batch of 1 texts"):
        encoder.encode("a")


def test_a_forked_child_is_refused(gpu_bundle: Path, standin: list[StandInSession]) -> None:
    encoder = Encoder(gpu_bundle, device="cuda")
    encoder._running._process = -1
    with pytest.raises(StartError, match=r"CUDA does not survive a fork.*spawn"):
        encoder.encode("a")


@pytest.mark.parametrize(("memory_gb", "expected"), [(0.1, 591), (8, 32768), (80, 32768)])
def test_batches_are_sized_to_the_card(memory_gb: float, expected: int) -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "max_seq_length": 512}
    model: Model = types.SimpleNamespace(**sizes)  # type: ignore[assignment]
    tokens = batch_tokens(model, int(memory_gb * 1e9))
    assert tokens == expected
    assert batch_tokens(model, 1) == 512  # one text must fit


def test_sorted_plans_cover_everything_once_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    for edges in ((), (32, 128, 512)):
        lengths = rng.integers(0, 513, 500)
        batches = list(plan_sorted(lengths, 4096, 40, edges))
        assert sorted(np.concatenate(batches)) == list(range(500))
        for rows in batches:
            longest = int(lengths[rows].max())
            assert len(rows) <= 40
            assert len(rows) * longest <= 4096
            for edge in edges:
                assert longest <= edge or lengths[rows].min() > edge
    assert list(plan_sorted(np.zeros(0, np.int64), 10)) == []
    assert [len(rows) for rows in plan_sorted(np.full(3, 50), 10)] == [1, 1, 1]


def test_the_service_runs_on_a_card(gpu_bundle: Path, sentences: list[str]) -> None:
    texts = sentences[:12]
    with serving(gpu_bundle, "--device", "cuda", "--max-batch-tokens", "256", command=GPU_SERVER) as server:
        reply = server.post("/embed", {"inputs": texts})
        assert reply.headers["x-compute-type"] == "gpu"
        info = server.get("/info").json
        assert (info["model_dtype"], info["max_batch_tokens"]) == ("float16", 256)
        assert any("(fp16, cuda" in line for line in server.log)
        assert server.post("/embed_all", {"inputs": texts[0]}).status == 424  # the graph gives no token vectors
    expected = Encoder(gpu_bundle, precision="fp32").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(np.array(reply.json, np.float32), expected, atol=2e-3)
