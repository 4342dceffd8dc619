"""What a service is told at its start: keys, the m3e-large-api mode, variables, what is no setting."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.server_process import running
from m3e import Encoder, InputError
from m3e.cli.main import main
from m3e.server.compat import DEFAULT_KEY, expand
from m3e.server.settings import Settings
from tests.asking import TEXTS, assert_openai_error, assert_tei_error, vectors


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
