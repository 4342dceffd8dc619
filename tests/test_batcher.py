"""Batcher and AsyncEncoder: shared batches give the encoder's vectors, deadlines, cancellation, clean ends."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from m3e import AsyncEncoder, Batcher, ClosedError, DeadlineError, Encoder, InputError
from tests.gates import Gate


def test_batches_are_as_large_as_the_device_likes(tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def embed(input_ids: list[list[int]]) -> Any:
        sizes.append(len(input_ids))
        return original(input_ids)

    async def encode() -> None:
        async with AsyncEncoder(tiny_encoder) as encoder:
            await encoder.encode(["a b"] * 12)

    original = tiny_encoder.embed
    monkeypatch.setattr(tiny_encoder, "embed", embed)
    monkeypatch.setattr(tiny_encoder._running.session, "max_shared_batch_tokens", 12)  # a text has four tokens
    with Batcher(tiny_encoder) as batcher:
        batcher.encode(["a b"] * 12)
    asyncio.run(encode())
    with Batcher(tiny_encoder, max_batch_tokens=16) as batcher:
        batcher.encode(["a b"] * 12)
    assert sizes[:8] == [3] * 8
    assert sizes[8:] == [4] * 3


def test_threads_get_the_encoders_vectors(tiny_encoder: Encoder, sentences: list[str]) -> None:
    texts = [text for text in sentences if len(text) < 300][:120]
    expected = tiny_encoder.encode(texts, normalize_embeddings=True)
    with Batcher(tiny_encoder) as batcher, ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda text: batcher.encode(text, normalize_embeddings=True), texts))
        parts = list(pool.map(lambda i: batcher.encode(texts[i : i + 7], truncate_dim=8), range(0, 112, 7)))
    np.testing.assert_array_equal(np.stack(alone), expected)
    np.testing.assert_array_equal(np.concatenate(parts), tiny_encoder.encode(texts[:112], truncate_dim=8))


def test_an_empty_list_and_wrong_arguments(tiny_encoder: Encoder) -> None:
    with Batcher(tiny_encoder) as batcher:
        assert batcher.encode([]).shape == (0, 64)
        with pytest.raises(InputError, match="sentences"):
            batcher.encode([1])  # type: ignore[list-item]
        with pytest.raises(InputError, match="no prompt named"):
            batcher.encode("a", prompt_name="x")
    with pytest.raises(ClosedError):
        batcher.encode("a")


def test_a_thread_gives_up_at_its_deadline(tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = tiny_encoder.embed
    monkeypatch.setattr(tiny_encoder, "embed", lambda ids: (gate.wait(10), real(ids))[1])
    with Batcher(tiny_encoder) as batcher:
        with pytest.raises(DeadlineError, match="0\\.05"):
            batcher.encode("a", timeout_s=0.05)
        gate.set()
        assert batcher.encode("a").shape == (64,)


@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")
def test_tasks_get_the_encoders_vectors(tiny_encoder: Encoder, sentences: list[str]) -> None:
    texts = [*[text for text in sentences if len(text) < 300][:60], "长" * 3000]
    expected = tiny_encoder.encode(texts[:-1])

    async def main() -> list[Any]:
        async with AsyncEncoder(tiny_encoder) as encoder:
            assert (await encoder.encode([])).shape == (0, 64)
            return list(await asyncio.gather(*(encoder.encode(text) for text in texts)))

    np.testing.assert_array_equal(np.stack(asyncio.run(main())[:-1]), expected)


def test_a_bundle_is_opened_without_stopping_the_loop_and_a_closed_encoder_says_so(tiny_bundle: Any) -> None:
    async def main() -> None:
        encoder = AsyncEncoder(tiny_bundle)
        with pytest.raises(ClosedError, match="async with"):
            await encoder.encode("a")
        async with encoder:
            assert (await encoder.encode("a")).shape == (64,)
        with pytest.raises(ClosedError):
            await encoder.encode("a")

    asyncio.run(main())


def test_a_cancelled_task_takes_its_texts_along(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    one_at_a_time = Encoder(tiny_bundle, num_threads=1)
    real = one_at_a_time.embed
    monkeypatch.setattr(one_at_a_time, "embed", lambda ids: (gate(ids), real(ids))[1])

    async def main() -> None:
        async with AsyncEncoder(one_at_a_time) as encoder:
            first = asyncio.create_task(encoder.encode("a"))
            await asyncio.to_thread(gate.entered.acquire)
            gone = [asyncio.create_task(encoder.encode("b c d")) for _ in range(20)]
            late = asyncio.create_task(encoder.encode("b c d", timeout_s=0.02))
            await asyncio.sleep(0.05)
            for task in gone:
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
            gate.open.set()
            await first
            with pytest.raises(DeadlineError):
                await late

    asyncio.run(main())
    assert len(gate.batches) == 1


@pytest.mark.filterwarnings("ignore::m3e.TruncationWarning")
def test_the_loop_stays_free_while_long_texts_are_tokenised(tiny_encoder: Encoder) -> None:
    async def main() -> int:
        async with AsyncEncoder(tiny_encoder) as encoder:
            task = asyncio.create_task(encoder.encode(["天气 " * 2_700] * 20))
            n_turns = 0
            while not task.done():
                await asyncio.sleep(0.001)
                n_turns += 1
            return n_turns

    assert asyncio.run(main()) >= 10


def test_another_priority_is_refused(tiny_encoder: Encoder) -> None:
    with Batcher(tiny_encoder) as batcher, pytest.raises(InputError, match="priority is 'high', expected one of"):
        batcher.encode("a", priority="high")  # type: ignore[arg-type]
