"""What goes over the wire, on a real server: vectors, the error contract in both dialects, limits, keys, probes."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.server_process import Reply, Server, running
from m3e import Encoder, InputError
from m3e.cli.main import main
from m3e.server.compat import DEFAULT_KEY, expand
from m3e.server.settings import Settings
from m3e_export.pipeline import convert

TEXTS = ["今天天气真好", "How do I reset my password?", " ", "a 🍜 “quoted”", "长" * 700]
CANARY = "canary-9f3a"


@pytest.fixture(scope="module")
def unit(token_bundle: Path) -> Any:
    encoder = Encoder(token_bundle)

    def embed(texts: Any, **named: Any) -> Any:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return encoder.encode(texts, normalize_embeddings=True, **named)

    return embed


def vectors(reply: Reply) -> np.ndarray[Any, Any]:
    assert reply.status == 200, reply.body
    content = reply.json
    rows = [item["embedding"] for item in content["data"]] if isinstance(content, dict) else content
    if isinstance(rows[0], str):
        return np.stack([np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows])
    return np.array(rows, dtype=np.float32)


def assert_openai_error(reply: Reply, status: int, param: str | None, code: str) -> None:
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json"), reply.body
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert reply.headers["x-request-id"]


def assert_tei_error(reply: Reply, status: int, type_: str, message: str | None = None) -> None:
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json"), reply.body
    assert set(reply.json) == {"error", "error_type"}
    assert reply.json["error_type"] == type_
    assert message is None or reply.json["error"] == message


# Vectors


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


# The error contract


@pytest.mark.parametrize(
    ("content", "status", "param", "code"),
    [
        pytest.param(b"{", 400, None, "invalid_json", id="cut JSON"),
        pytest.param(b'{"input": "a"} x', 400, None, "invalid_json", id="trailing garbage"),
        pytest.param(b'\xef\xbb\xbf{"input": "a"}', 400, None, "invalid_json", id="byte order mark"),
        pytest.param(b'{"input": "\xff"}', 400, None, "invalid_json", id="not UTF-8"),
        pytest.param(b'{"input": "\\ud800"}', 400, None, "invalid_json", id="lone surrogate"),
        pytest.param(b'{"input": NaN}', 400, None, "invalid_json", id="NaN"),
        pytest.param(b"", 400, None, "invalid_json", id="empty body"),
        pytest.param(b"[" * 33 + b"]" * 33, 400, None, "invalid_json", id="deep 33"),
        pytest.param(b"[" * 900_000, 400, None, "invalid_json", id="deep 900,000"),
        pytest.param(b'{"a":' * 900 + b"1" + b"}" * 900, 400, None, "invalid_json", id="deep objects"),
        pytest.param(b"[]", 400, None, "invalid_type", id="not an object"),
        pytest.param({}, 400, "input", "missing_required_parameter", id="no input"),
        pytest.param({"input": None}, 400, "input", "invalid_type", id="null"),
        pytest.param({"input": 7}, 400, "input", "invalid_type", id="number"),
        pytest.param({"input": {"a": 1}}, 400, "input", "invalid_type", id="object"),
        pytest.param({"input": ["a", 1]}, 400, "input[1]", "invalid_type", id="mixed"),
        pytest.param({"input": ["a", None]}, 400, "input[1]", "invalid_type", id="null in list"),
        pytest.param({"input": ""}, 400, "input", "empty_input", id="empty text"),
        pytest.param({"input": ["a", ""]}, 400, "input[1]", "empty_input", id="empty text in list"),
        pytest.param({"input": []}, 400, "input", "empty_input", id="empty list"),
        pytest.param({"input": ["a"] * 41}, 400, "input", "array_above_max_length", id="too many"),
        pytest.param({"input": [1, 2]}, 400, "input", "token_ids_not_accepted", id="token ids"),
        pytest.param({"input": [[1, 2], [3]]}, 400, "input", "token_ids_not_accepted", id="lists of token ids"),
        pytest.param({"input": [True]}, 400, "input[0]", "invalid_type", id="boolean"),
        pytest.param({"input": "a", "dimensions": 0}, 400, "dimensions", "unsupported_value", id="dimensions 0"),
        pytest.param({"input": "a", "dimensions": 65}, 400, "dimensions", "unsupported_value", id="dimensions 65"),
        pytest.param({"input": "a", "dimensions": 8.5}, 400, "dimensions", "invalid_type", id="dimensions 8.5"),
        pytest.param({"input": "a", "dimensions": True}, 400, "dimensions", "invalid_type", id="dimensions true"),
        pytest.param(b'{"input": "a", "dimensions": 1e400}', 400, None, "invalid_json", id="dimensions 1e400"),
        pytest.param({"input": "a", "dimensions": 2**80}, 400, "dimensions", None, id="dimensions 2^80"),
        pytest.param({"input": "a", "encoding_format": "hex"}, 400, "encoding_format", "invalid_value", id="encoding"),
        pytest.param({"input": "a", "model": "other"}, 404, "model", "model_not_found", id="model"),
        pytest.param({"input": "a", "model": "../tiny"}, 404, "model", "model_not_found", id="model is no path"),
        pytest.param({"input": "a", "model": 1}, 400, "model", "invalid_type", id="model 1"),
        pytest.param({"input": "a", "user": 1}, 400, "user", "invalid_type", id="user 1"),
    ],
)
def test_openai_refusals(server: Server, content: Any, status: int, param: str | None, code: str | None) -> None:
    reply = server.post("/v1/embeddings", content)
    assert_openai_error(reply, status, param, code or reply.json["error"]["code"])


@pytest.mark.parametrize("body", [b'{"input": "a", "input": "b"}', b'{"input": "a\\u0000b"}', b'{"input": "\\u3000"}'])
def test_odd_but_valid(server: Server, body: bytes) -> None:
    assert server.post("/v1/embeddings", body).status == 200


def test_refused_token_ids_tell_langchain_what_to_set(server: Server) -> None:
    message = server.post("/v1/embeddings", {"input": [[101, 102]]}).json["error"]["message"]
    assert "check_embedding_ctx_length=False" in message


@pytest.mark.parametrize(
    ("content", "status", "type_", "message"),
    [
        pytest.param({"inputs": ""}, 400, "Empty", "Input validation error: `inputs` cannot be empty", id="empty text"),
        pytest.param({"inputs": []}, 400, "Empty", "`inputs` cannot be empty", id="empty list"),
        pytest.param(
            {"inputs": ["a"] * 41}, 422, "Validation", "batch size 41 > maximum allowed batch size 40", id="many"
        ),
        pytest.param(
            {"inputs": "长" * 602, "truncate": False}, 422, "Validation",
            "Input validation error: `inputs` must have less than 512 tokens. Given: 604", id="too long",
        ),
        pytest.param(
            {"inputs": "a", "dimensions": 0}, 422, "Validation",
            "Input validation error: `dimensions` should be positive", id="dimensions 0",
        ),
        pytest.param({"inputs": "a", "dimensions": 65}, 422, "Validation", None, id="dimensions 65"),
        pytest.param({"inputs": "a", "prompt_name": "x"}, 422, "Validation", None, id="prompt"),
        pytest.param({"inputs": "a", "truncation_direction": "left"}, 422, "Validation", None, id="left"),
        pytest.param({"inputs": 3}, 422, "Validation", None, id="number"),
        pytest.param({}, 422, "Validation", None, id="missing"),
        pytest.param(b"{", 400, "Validation", None, id="not JSON"),
    ],
)  # fmt: skip
def test_tei_refusals(server: Server, content: Any, status: int, type_: str, message: str | None) -> None:
    assert_tei_error(server.post("/embed", content), status, type_, message)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/decode", {"ids": [30000]}),
        ("/decode", {"ids": [-1]}),
        ("/decode", {"ids": "a"}),
        ("/decode", {}),
        ("/decode", {"ids": [[1], 2]}),
        ("/decode", {"ids": [[2**70]]}),
        ("/tokenize", {"inputs": [[1]]}),
        ("/similarity", {"inputs": "a"}),
        ("/similarity", {"inputs": {"source_sentence": ["a"], "sentences": ["b"]}}),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": "b"}}),
        ("/similarity", {"inputs": {"source_sentence": "a"}}),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": {"calibrated": True}}),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": {"calibrated": 1}}),
    ],
)
def test_refusals_of_the_other_routes(server: Server, path: str, content: Any) -> None:
    assert_tei_error(server.post(path, content), 422, "Validation")


def test_media_types(server: Server) -> None:
    for headers in ({"content-type": "text/plain"}, {"content-encoding": "gzip"}):
        reply = server.post("/v1/embeddings", {"input": "a"}, headers=headers)
        assert_openai_error(reply, 415, None, "unsupported_media_type")
    charset = {"content-type": "application/json; charset=utf-8"}
    assert server.post("/embed", {"inputs": "a"}, headers=charset).status == 200


@pytest.mark.parametrize("path", ["/v1/embeddings/v1/embeddings", "/v1/v1/embeddings", "/v1", "/v1/chat/completions"])
def test_a_mis_joined_path_says_what_to_set(server: Server, path: str) -> None:
    reply = server.post(path, {"input": "a"})
    assert_openai_error(reply, 404, None, "not_found")
    assert "set the base URL to http://HOST:PORT/v1" in reply.json["error"]["message"]


def test_methods(server: Server) -> None:
    reply = server.get("/v1/embeddings")
    assert_openai_error(reply, 405, None, "method_not_allowed")
    assert reply.headers["allow"] == "POST"
    assert_tei_error(server.post("/info", {}), 405, "Validation")
    head = server.request("HEAD", "/info")
    assert (head.status, head.body) == (200, b"")


def test_bodies_up_to_the_limit_and_not_beyond(server: Server) -> None:
    content = {"input": "好", "user": ""}
    room = 2_000_000 - len(json.dumps(content))
    assert server.post("/v1/embeddings", {**content, "user": "x" * room}).status == 200
    over = json.dumps({**content, "user": "x" * (room + 1)}).encode()
    assert_openai_error(server.post("/v1/embeddings", over), 413, None, "content_too_large")
    chunks = raw(server, b"POST /embed HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
                 + b"186a0\r\n" + b" " * 100_000 + b"\r\n", times=21, end=b"0\r\n\r\n")  # fmt: skip
    assert chunks.startswith(b"HTTP/1.1 413")
    assert b'"error_type":"Validation"' in chunks


def test_a_lying_content_length_does_not_make_the_server_wait_or_store(server: Server) -> None:
    reply = raw(server, b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 413")


def raw(server: Server, data: bytes, *, times: int = 1, end: bytes = b"", seconds: float = 10) -> bytes:
    """Send bytes; everything after the blank line is repeated; what comes back until the server closes or rests."""
    head, separator, rest = data.partition(b"\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(head + separator + rest * times + end)
        parts = b""
        while b"\r\n\r\n" not in parts or b"}" not in parts:
            part = connection.recv(65536)
            if not part:
                break
            parts += part
        return parts


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"nonsense\r\n\r\n", 400, id="not HTTP"),
        pytest.param(b"GET / HTTP/9.9\r\n\r\n", 400, id="version"),
        pytest.param(b"POST /embed HTTP/1.1\r\ncontent-length: -5\r\n\r\n", 400, id="negative length"),
        pytest.param(b"POST /embed HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400, id="length is no number"),
        pytest.param(
            b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400,
            id="both lengths",
        ),
        pytest.param(b"POST /embed HTTP/1.1\r\nhost: a\r\n folded: x\r\n\r\n", 400, id="folded header"),
        pytest.param(b"GET /info HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n", 400, id="two hosts"),
        pytest.param(b"GET /info HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431, id="101 headers"),
        pytest.param(b"GET /info HTTP/1.1\r\na: " + b"b" * 70_000 + b"\r\n\r\n", 431, id="a large header"),
        pytest.param(b"GET /info HTTP/1.1\r\na: " + b"b" * 200_000, 431, id="a header without end"),
        pytest.param(b"GET /" + b"a" * 200_000, 431, id="a path without end"),
    ],
)  # fmt: skip
def test_what_is_not_http_gets_json_too(server: Server, data: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(data)
        reply = b""
        try:
            while part := connection.recv(65536):
                reply += part
        except ConnectionResetError:  # more was under way than the server wanted
            pass
    assert reply.startswith(b"HTTP/1.1 %d" % status), reply[:200]
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert server.ready()


def test_host_and_origin(server: Server) -> None:
    assert server.get("/health/live", headers={"host": "localhost:99"}).status == 200
    assert_tei_error(server.get("/info", headers={"host": "evil.example"}), 403, "Validation")
    reply = server.post("/embed", {"inputs": "a"}, headers={"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in reply.headers


def test_request_ids(server: Server) -> None:
    assert server.get("/info", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    other = [server.get("/info", headers={"x-request-id": "a b\t"}).headers["x-request-id"] for _ in range(2)]
    assert other[0] != other[1]
    assert "a b" not in other


def test_priorities(server: Server) -> None:
    for name in ("interactive", "bulk"):
        assert server.post("/embed", {"inputs": "a"}, headers={"x-priority": name}).status == 200
    assert_tei_error(server.post("/embed", {"inputs": "a"}, headers={"x-priority": "vip"}), 422, "Validation")


def test_metrics_exist_from_the_start_and_stay_as_many(
    server: Server, cases: Callable[[int], int], record_property: Callable[[str, str], None]
) -> None:
    n, before = cases(30), server.metrics()
    for i in range(n):
        server.get(f"/{i}")
    for i in range(30):
        server.post("/v1/embeddings", {"input": "a", "model": str(i)})
    server.post("/embed", {"inputs": ["a", "b"]})
    after = server.metrics()
    record_property("D5", f"{len(after) - len(before)} more after {n:,} paths")
    assert before.keys() == after.keys()
    grown = {name for name in after if after[name] > before[name]}
    assert "m3e_requests_total[('route', 'unmatched'), ('status', '4xx')]" in grown
    assert "te_request_count[('method', 'batch')]" in grown
    for name in ("te_request_success", "te_request_failure", "te_embed_count", "te_request_duration_count",
                 "te_request_tokenization_duration_count", "te_request_queue_duration_sum", "te_queue_size",
                 "te_request_inference_duration_bucket", "te_embed_duration_count", "te_request_input_length_count",
                 "te_batch_next_size_count", "te_batch_next_tokens_sum", "m3e_ready", "m3e_queue_tokens"):  # fmt: skip
        assert any(key.partition("[")[0] == name for key in after), name


def test_no_text_comes_back_or_into_the_log(server: Server, record_property: Callable[[str, str], None]) -> None:
    places: list[tuple[str, Any, dict[str, str]]] = [
        ("/v1/embeddings", {"input": [CANARY, ""]}, {}),
        ("/v1/embeddings", {"input": "a", "model": CANARY}, {}),
        ("/v1/embeddings", {"input": "a", "encoding_format": CANARY}, {}),
        ("/v1/embeddings", {"input": "a", "dimensions": CANARY}, {}),
        ("/v1/embeddings", f'{{"input": "{CANARY}'.encode(), {}),
        ("/embed", {"inputs": [CANARY, 1]}, {}),
        ("/embed", {"inputs": "a", "prompt_name": CANARY}, {}),
        ("/embed", {"inputs": CANARY * 300, "truncate": False}, {}),
        ("/similarity", {"inputs": {"source_sentence": CANARY, "sentences": [1]}}, {}),
        (f"/{CANARY}", {"inputs": CANARY}, {}),
        (f"/v1/models/{CANARY}", {}, {}),
        ("/embed", {"inputs": "a"}, {"content-type": CANARY}),
        ("/embed", {"inputs": "a"}, {"host": CANARY}),
        ("/embed", {"inputs": "a"}, {"x-priority": CANARY}),
    ]
    for path, content, headers in places:
        reply = server.post(path, content, headers=headers)
        assert reply.status >= 400, path
        assert CANARY.encode() not in reply.body
    assert CANARY.encode() not in server.get("/metrics").body
    assert CANARY not in "".join(server.log)
    record_property("F1", f"0 in {len(places)} refusals, the metrics and the log")


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


# Settings


def test_keys(tiny_bundle: Path, tmp_path: Path, record_property: Callable[[str, str], None]) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# two\nalpha\nbeta\n")
    with running(tiny_bundle, M3E_API_KEY_FILE=str(keys), M3E_ACCEPT_TOKEN_IDS="true", M3E_AUTO_TRUNCATE="0") as server:
        document = server.get("/openapi.json", headers={"authorization": "Bearer beta"}).json
        routes = [(method.upper(), path) for path, item in document["paths"].items() for method in item]
        public = {path for method, path in routes
                  if server.request(method, path, {} if method == "POST" else None).status != 401}  # fmt: skip
        record_property("F2", f"{', '.join(sorted(public))} of {len(routes)}")
        assert public == {"/health", "/health/live", "/health/ready", "/ui"}
        for value in ("Bearer gamma", "Bearer", "Basic alpha", "alpha", "Bearer " + "x" * 10_000, "Bearer \xe9"):
            reply = server.post("/v1/embeddings", {"input": "a"}, headers={"authorization": value})
            assert_openai_error(reply, 401, None, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
        for value in ("Bearer alpha", "bearer beta"):
            assert server.post("/v1/embeddings", {"input": "a"}, headers={"authorization": value}).status == 200
        key = {"authorization": "Bearer alpha"}
        ids = Encoder(tiny_bundle).tokenize_batch(["你好", "a b"]).input_ids
        expected = Encoder(tiny_bundle).encode(["你好", "a b"], normalize_embeddings=True)
        np.testing.assert_array_equal(vectors(server.post("/v1/embeddings", {"input": ids}, headers=key)), expected)
        for bad in ([[21128]], [[-1]], [-1], [2**31]):
            reply = server.post("/v1/embeddings", {"input": bad}, headers=key)
            assert_openai_error(reply, 400, "input[0]", "invalid_token_id")
        long = server.post("/v1/embeddings", {"input": ["a", "长" * 600]}, headers=key)
        assert_openai_error(long, 400, "input[1]", "context_length_exceeded")
        assert_tei_error(server.post("/embed_all", {"inputs": "a"}, headers=key), 424, "Backend")


def test_in_the_place_of_the_m3e_large_api_script(tiny_bundle: Path) -> None:
    with running(
        tiny_bundle, "--compat", "m3e-large-api", "--accept-any-model", "--cors-origins", "http://app.example"
    ) as server:
        assert server.post("/v1/embeddings", {"input": "a"}).status == 401
        key = {"authorization": f"Bearer {DEFAULT_KEY}", "origin": "http://app.example"}
        reply = server.post("/v1/embeddings", {"input": TEXTS[:2], "model": "m3e"}, headers=key)
        assert reply.headers["access-control-allow-origin"] == "http://app.example"
        wide = expand(Encoder(tiny_bundle).encode(TEXTS[:2]))
        np.testing.assert_allclose(vectors(reply), wide / np.linalg.norm(wide, axis=1, keepdims=True), atol=1e-7)
        assert vectors(reply).shape == (2, 1536)
        preflight = server.request("OPTIONS", "/v1/embeddings", headers={"origin": "http://app.example"})
        assert "authorization" in preflight.headers["access-control-allow-headers"]


def test_the_public_key_is_not_valid_beside_others(tiny_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alpha\n")
    with running(tiny_bundle, "--compat", "m3e-large-api", "--api-key-file", keys) as server:
        statuses = [
            server.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status
            for key in (DEFAULT_KEY, "alpha")
        ]
        assert statuses == [401, 200]


def test_a_variable_that_kubernetes_sets_is_no_port(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every pod beside a Service named m3e."""
    monkeypatch.setenv("M3E_PORT", "tcp://10.96.0.12:80")
    assert main(["serve", str(tiny_bundle), "--host", "256.0.0.1"]) == 2
    assert "cannot listen on 256.0.0.1:8080" in capsys.readouterr().err


@pytest.mark.parametrize("width", [1, 2, 30, 64, 512, 1024, 1536, 2000])
def test_the_expansion_is_scikit_learns(width: int) -> None:
    from sklearn.preprocessing import PolynomialFeatures

    rows = np.random.default_rng(0).standard_normal((2, width)).astype(np.float32)
    if width >= 1536:
        np.testing.assert_array_equal(expand(rows), rows[:, :1536])
        return
    if width <= 64:
        reference = PolynomialFeatures(degree=2).fit_transform(rows)[:, :1536]
    else:  # the full square would be large; its first 1536 columns need only the first few inputs
        first = [np.ones((2, 1), np.float32), rows, *(rows[:, i : i + 1] * rows[:, i:] for i in range(3))]
        reference = np.concatenate(first, axis=1)[:, :1536]
    np.testing.assert_allclose(expand(rows)[:, : reference.shape[1]], reference, rtol=1e-6)
    assert not expand(rows)[:, reference.shape[1] :].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "x"], "--port (M3E_PORT) is 'x', expected a number"),
        (["--max-body-bytes", "0"], "max_body_bytes is 0, expected at least 1"),
        (["--api-key-file", "nowhere"], "the key file cannot be read"),
    ],
)
def test_wrong_settings(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["serve", str(tiny_bundle), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_settings_without_a_bundle() -> None:
    with pytest.raises(InputError, match="no bundle"):
        Settings(bundles=())


def test_a_missing_bundle_ends_the_server_with_the_reason(tmp_path: Path) -> None:
    from benchmarks.server_process import start

    server = start(tmp_path / "nothing", ready=False)
    assert server.process.wait(20) == 1
    time.sleep(0.1)
    assert "no bundle at" in "".join(server.log)
    assert server.process.stderr is not None
    server.process.stderr.close()
