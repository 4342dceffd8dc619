"""What the service answers, on a real server: vectors, counts and times, tokens, similarities, models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.server_process import Server, running
from m3e import Encoder
from m3e_export.pipeline import convert
from tests.asking import TEXTS, assert_tei_error, vectors


@pytest.fixture(scope="module")
def unit(token_bundle: Path) -> Any:
    encoder = Encoder(token_bundle)

    def embed(texts: Any, **named: Any) -> Any:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return encoder.encode(texts, normalize_embeddings=True, **named)

    return embed


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/v1/embeddings/"])
@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_openai_vectors_are_the_encoders_to_the_last_bit(server: Server, unit: Any, path: str, encoding: Any) -> None:
    reply = server.post(path, {"input": TEXTS, "model": "tiny", "encoding_format": encoding, "user": "u", "extra": 1})
    np.testing.assert_array_equal(vectors(reply), unit(TEXTS))
    content = reply.json
    assert [item["index"] for item in content["data"]] == list(range(len(TEXTS)))
    assert [(item["tokens"], item["truncated_tokens"]) for item in content["data"]][-1] == (512, 190)
    total = sum(item["tokens"] for item in content["data"])
    assert content["usage"] == {"prompt_tokens": total, "total_tokens": total}
    assert (content["object"], content["model"]) == ("list", "tiny")


@pytest.mark.parametrize("dimensions", [8, 8.0])  # to JSON Schema both are integers
def test_a_single_text_and_dimensions(server: Server, unit: Any, dimensions: float) -> None:
    reply = server.post("/v1/embeddings", {"input": TEXTS[0], "dimensions": dimensions})
    np.testing.assert_array_equal(vectors(reply), unit(TEXTS[:1], truncate_dim=8))


@pytest.mark.parametrize("path", ["/embed", "/"])
def test_tei_vectors(server: Server, unit: Any, path: str) -> None:
    np.testing.assert_array_equal(vectors(server.post(path, {"inputs": TEXTS})), unit(TEXTS))
    single = server.post(path, {"inputs": TEXTS[0], "normalize": None, "truncate": True, "prompt_name": None})
    np.testing.assert_array_equal(vectors(single), unit(TEXTS[:1]))
    np.testing.assert_array_equal(
        vectors(server.post(path, {"inputs": TEXTS, "dimensions": 8})), unit(TEXTS, truncate_dim=8)
    )


def test_tei_without_normalisation(server: Server, token_bundle: Path) -> None:
    reply = server.post("/embed", {"inputs": TEXTS[:2], "normalize": False})
    np.testing.assert_array_equal(vectors(reply), Encoder(token_bundle).encode(TEXTS[:2]))


def test_counts_and_times_are_in_the_headers(server: Server) -> None:
    headers = server.post("/embed", {"inputs": TEXTS}).headers
    counts = headers["x-input-tokens"].split(",")
    assert counts[-1] == "512/702"
    assert int(headers["x-compute-tokens"]) == sum(int(count.split("/")[0]) for count in counts)
    assert int(headers["x-compute-characters"]) == sum(map(len, TEXTS))
    for name in ("x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time"):
        assert int(headers[name]) >= 0
    assert re.match(
        r"tokenize;dur=[\d.]+, queue;dur=[\d.]+, inference;dur=[\d.]+, total;dur=", headers["server-timing"]
    )


def test_token_vectors(server: Server, token_bundle: Path) -> None:
    rows = server.post("/embed_all", {"inputs": TEXTS[:2]}).json
    encoder = Encoder(token_bundle)
    for row, ids in zip(rows, encoder.tokenize_batch(TEXTS[:2]).input_ids, strict=True):
        np.testing.assert_array_equal(np.array(row, dtype=np.float32), encoder.embed_tokens(ids))


def test_tokens_carry_byte_offsets_and_decode_back(server: Server) -> None:
    text = "今天 sunny 天气🍜"
    (row,) = server.post("/tokenize", {"inputs": text}).json
    assert [row[0][key] for key in ("text", "special", "start", "stop")] == ["[CLS]", True, None, None]
    assert row[-1]["text"] == "[SEP]"
    for token in row[1:-1]:
        assert text.encode()[token["start"] : token["stop"]].decode() == token["text"]
    (bare,) = server.post("/tokenize", {"inputs": [text], "add_special_tokens": False}).json
    assert [token["id"] for token in bare] == [token["id"] for token in row[1:-1]]
    ids = [token["id"] for token in row]
    assert server.post("/decode", {"ids": ids}).json == server.post("/decode", {"ids": [ids]}).json
    assert "今 天" in server.post("/decode", {"ids": ids}).json[0]
    assert server.post("/decode", {"ids": [float(i) for i in ids]}).json == server.post("/decode", {"ids": ids}).json
    assert "[CLS]" in server.post("/decode", {"ids": ids, "skip_special_tokens": False}).json[0]


def test_similarity_is_the_cosine(server: Server, unit: Any) -> None:
    reply = server.post("/similarity", {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}})
    rows = unit(TEXTS)
    np.testing.assert_allclose(reply.json, rows[1:] @ rows[0], atol=1e-6)


def test_models_and_info(server: Server) -> None:
    (card,) = server.get("/v1/models").json["data"]
    assert card["id"] == "tiny"
    assert server.get("/v1/models/tiny").json == card
    info = server.get("/info").json
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert (info["max_input_length"], info["model_dtype"], info["max_client_batch_size"]) == (512, "float32", 40)
    assert info["max_batch_tokens"] == 256
    assert info["space_id"]


def test_what_was_cut_of_a_very_long_text_is_told_as_at_least(server: Server, token_bundle: Path) -> None:
    text = "长" * 20_000
    full = int(Encoder(token_bundle).count_tokens([text], exact=False)[0])
    assert 512 < full < 20_002
    assert server.post("/embed", {"inputs": text}).headers["x-input-tokens"] == f"512/{full}"
    assert server.post("/v1/embeddings", {"input": text}).json["data"][0]["truncated_tokens"] == full - 512
    refusal = server.post("/embed", {"inputs": text, "truncate": False}).json["error"]
    assert refusal == f"Input validation error: `inputs` must have less than 512 tokens. Given: {full}"


def test_a_prompt_that_is_not_pooled_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    pooling = checkpoint / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "include_prompt": False}))
    described = checkpoint / "config_sentence_transformers.json"
    described.write_text(json.dumps({"prompts": {"query": "为这个句子"}}))
    convert(str(checkpoint), tmp_path / "bundle")
    with running(tmp_path / "bundle") as server:
        np.testing.assert_array_equal(
            vectors(server.post("/embed", {"inputs": TEXTS[:1], "normalize": False})),
            Encoder(tmp_path / "bundle").encode(TEXTS[:1]),
        )
        reply = server.post("/embed", {"inputs": "a", "prompt_name": "query"})
        assert_tei_error(reply, 422, "Validation")
        assert "does not pool its prompts" in reply.json["error"]
