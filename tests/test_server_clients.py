"""Other people's clients, unmodified, against a real server; and the page in a real browser."""

from __future__ import annotations

import asyncio
import importlib
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.server_process import Server
from m3e import Encoder

TEXTS = ["今天天气真好", "How do I reset my password?", "a 🍜"]
KEY = "unused"


@pytest.fixture(scope="module")
def expected(token_bundle: Path) -> np.ndarray[Any, Any]:
    return Encoder(token_bundle).encode(TEXTS, normalize_embeddings=True)


def test_openai(server: Server, expected: np.ndarray[Any, Any]) -> None:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        answer = client.embeddings.create(model="tiny", input=TEXTS)
        np.testing.assert_array_equal(np.array([item.embedding for item in answer.data], dtype=np.float32), expected)
        as_floats = client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float")
        np.testing.assert_array_equal(np.array(as_floats.data[0].embedding, dtype=np.float32), expected[0])
        assert answer.usage.prompt_tokens > 0
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="tiny", input=["a", ""])
        assert (caught.value.param, caught.value.code, caught.value.type) == (
            "input[1]", "empty_input", "invalid_request_error",
        )  # fmt: skip
        assert caught.value.request_id
        with pytest.raises(openai.NotFoundError) as missing:
            client.embeddings.create(model="other", input="a")
        assert missing.value.code == "model_not_found"


def test_openai_async(server: Server, expected: np.ndarray[Any, Any]) -> None:
    import openai

    async def main() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            return list(
                await asyncio.gather(*(client.embeddings.create(model="tiny", input=text) for text in TEXTS * 5))
            )

    rows = [answer.data[0].embedding for answer in asyncio.run(main())]
    np.testing.assert_array_equal(np.array(rows, dtype=np.float32), np.tile(expected, (5, 1)))


def test_hugging_face_inference_client(server: Server, expected: np.ndarray[Any, Any]) -> None:
    from huggingface_hub import InferenceClient

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        client = InferenceClient(base_url=server.url)
        rows = client.feature_extraction(TEXTS[0], normalize=True, truncate=True)
    np.testing.assert_array_equal(np.asarray(rows, dtype=np.float32).reshape(-1), expected[0])


# The three that follow leave their connections open until the process ends, so they get one that is closed.


@pytest.mark.frameworks
def test_langchain(server: Server, expected: np.ndarray[Any, Any]) -> None:
    import openai

    module = importlib.import_module("langchain_openai")
    arguments = {"model": "tiny", "base_url": f"{server.url}/v1", "api_key": KEY}
    with openai.DefaultHttpxClient() as client:
        embeddings = module.OpenAIEmbeddings(check_embedding_ctx_length=False, http_client=client, **arguments)
        np.testing.assert_array_equal(np.array(embeddings.embed_documents(TEXTS), dtype=np.float32), expected)
        np.testing.assert_array_equal(np.array(embeddings.embed_query(TEXTS[0]), dtype=np.float32), expected[0])


@pytest.mark.frameworks
def test_llama_index(server: Server, expected: np.ndarray[Any, Any]) -> None:
    import openai

    module = importlib.import_module("llama_index.embeddings.openai")
    arguments = {"model_name": "tiny", "api_base": f"{server.url}/v1", "api_key": KEY}
    with openai.DefaultHttpxClient() as client:
        rows = module.OpenAIEmbedding(http_client=client, **arguments).get_text_embedding_batch(TEXTS)
    np.testing.assert_array_equal(np.array(rows, dtype=np.float32), expected)


@pytest.mark.frameworks
def test_chroma(server: Server, expected: np.ndarray[Any, Any]) -> None:
    module = importlib.import_module("chromadb.utils.embedding_functions")
    function = module.HuggingFaceEmbeddingServer(url=f"{server.url}/embed")
    with function._session:
        rows = function(TEXTS)
    np.testing.assert_allclose(np.array(rows, dtype=np.float32), expected, atol=1e-7)


# The document


@pytest.mark.parametrize("examples", [pytest.param(5, id="few"), pytest.param(500, id="many", marks=pytest.mark.long)])
def test_the_wire_is_the_document(
    examples: int, server: Server, tmp_path: Path,
    cases: Callable[[int], int], record_property: Callable[[str, str], None],
) -> None:  # fmt: skip
    """Schemathesis with all of its checks on every operation."""
    before = n_answers(server)
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", "all",
         "--phases", "examples,coverage,fuzzing", "--max-examples", str(cases(examples)), "--seed", "1", "--no-color"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert server.ready()
    for goal in ("A2", "F6"):
        record_property(goal, f"0 of {n_answers(server) - before:,}")


def n_answers(server: Server) -> int:
    return int(sum(value for name, value in server.metrics().items() if name.startswith("m3e_requests_total")))


# The page


def test_the_page_in_a_browser(server: Server) -> None:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium is not None, "apt install chromium chromium-driver"
    assert driver is not None, "apt install chromium chromium-driver"
    page = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom",
         f"{server.url}/ui#compare"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert len(re.findall(r"<td", page)) == 25
    assert page.count(">1.000<") >= 5
    assert "tokens in" in page
