"""What reads bytes from elsewhere, as functions of bytes for a fuzzer.

Each raises nothing, or it has found something. They import the runtime and nothing of the tests, so that atheris can
run them in an environment of its own (`tests.trust.guided`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import orjson

from m3e.errors import BundleError, InferenceError, InputError
from m3e.graph_check import check_graph
from m3e.manifest import MANIFEST_NAME, Graph, Manifest
from m3e.server.problems import Dialect, Problem
from m3e.server.requests import Request, parse_field, parse_inputs, parse_object
from m3e.server.settings import Settings
from m3e.tokenizer import Tokenizer
from m3e.tokenizer_check import check_tokenizer

Target = Callable[[bytes], None]
# Folder of the bundle whose files are the seeds.
BUNDLE_VARIABLE = "M3E_TRUST_BUNDLE"
_VOCAB_SIZE, _DEEPEST = 21128, 32
_DIALECTS: tuple[Dialect, ...] = ("openai", "tei")


def bundle() -> Path:
    """The bundle that the environment names."""
    return Path(os.environ[BUNDLE_VARIABLE])


def read_manifest(data: bytes) -> None:
    """Any bytes: a manifest or a BundleError."""
    try:
        Manifest.from_bytes(data)
    except BundleError as refusal:
        message = str(refusal)
    else:
        return
    assert MANIFEST_NAME in message


def read_sealed_manifest(data: bytes) -> None:
    """Any JSON object with a hash that is right, so that the fields behind it are reached."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(content, dict):
        return
    content.pop("manifest_sha256", None)

    def canonical() -> bytes:
        text = json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
        return text.encode("utf-8", "surrogatepass")

    content["manifest_sha256"] = hashlib.sha256(canonical()).hexdigest()
    read_manifest(canonical())


def parse_request(data: bytes) -> None:
    """Any body: texts or ids of the right type, or a problem that both dialects can say."""
    for accept_ids in (False, True):
        settings = Settings(bundles=("x",), accept_token_ids=accept_ids)
        request = Request(
            "POST", "/v1/embeddings", "/v1/embeddings", {b"content-type": b"application/json"}, b"id", 0.0, data
        )
        try:
            content = parse_object(request, _DEEPEST)
            parse_field(content, "dimensions", int, None)
            parse_field(content, "encoding_format", str, "float", {"float", "base64"}.__contains__, "float, base64")
            inputs = parse_inputs(content, "input", settings, _VOCAB_SIZE)
        except Problem as refusal:
            problem = refusal
        else:
            assert all(type(text) is str for text in inputs.texts)
            assert all(0 <= token < _VOCAB_SIZE for ids in inputs.token_ids for token in ids)
            assert 0 < inputs.n <= settings.max_client_batch_size
            continue
        for dialect in _DIALECTS:
            assert 400 <= problem.status(dialect) < 500
            orjson.loads(problem.body(dialect))


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer((bundle() / "tokenizer.json").read_bytes(), 512)


def tokenize(data: bytes) -> None:
    """Any text, lone surrogates too: ids of the vocabulary, or an InputError."""
    text = data.decode("utf-8", "surrogateescape" if data[:1] == b"\xed" else "replace")
    try:
        tokens = _tokenizer()([text, "a"])
    except InputError:
        assert any("\ud800" <= character <= "\udfff" for character in text)
        return
    ids = tokens.input_ids[0]
    assert (ids[0], ids[-1]) == (2, 3)
    assert len(ids) == tokens.n_tokens[0] <= min(512, tokens.n_tokens_full[0])
    assert all(0 <= token < _VOCAB_SIZE for token in ids)


def open_tokenizer(data: bytes) -> None:
    """Any tokenizer.json: a tokenizer or a BundleError; and what opened tokenises or says that it cannot."""
    with contextlib.suppress(BundleError, InferenceError):
        check_tokenizer(data, _VOCAB_SIZE)
        Tokenizer(data, 512)(["今天 a  b's", ""])


@functools.cache
def _graph() -> Graph:
    return Manifest.from_bytes((bundle() / MANIFEST_NAME).read_bytes()).graphs[0]


def read_graph(data: bytes) -> None:
    """Any bytes for a graph: what the manifest says, or a BundleError that names the file."""
    try:
        check_graph(data, _graph())
    except BundleError as refusal:
        message = str(refusal)
    else:
        return
    assert _graph().file in message


def careless_manifest(data: bytes) -> None:
    """A negative control, as the others are: believes what begins like an object."""
    if data[:1] == b"{" and data[1:2] == b'"':
        json.loads(data)["format_version"]


def careless_request(data: bytes) -> None:
    """Believes that an object holds texts."""
    with contextlib.suppress(ValueError):
        content = json.loads(data)
        if isinstance(content, dict) and "input" in content:
            len(content["input"])


def careless_text(data: bytes) -> None:
    """Believes that bytes are UTF-8."""
    data.decode("utf-8")


def careless_graph(data: bytes) -> None:
    """Believes the lengths in a protobuf."""
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
            if byte < 128:
                return value

    while place < len(data):
        if number() & 7 == 2:
            place += number()
            data[place - 1]
        else:
            number()


def careless_tokenizer(data: bytes) -> None:
    """Believes that what is an object has a model."""
    with contextlib.suppress(ValueError):
        content = json.loads(data)
        if isinstance(content, dict):
            content["model"]


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (read_manifest, read_sealed_manifest, read_graph, parse_request, tokenize, open_tokenizer)
}
CONTROLS: dict[str, Target] = {
    target.__name__: target
    for target in (careless_manifest, careless_graph, careless_request, careless_text, careless_tokenizer)
}
