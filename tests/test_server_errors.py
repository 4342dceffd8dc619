"""The error contract in both dialects, on a real server: refusals, limits, what is not HTTP; nothing quotes a text."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.server_process import Server
from tests.asking import assert_openai_error, assert_tei_error

CANARY = "canary-9f3a"


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
