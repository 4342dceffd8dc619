"""The manifest: what is written is what is read, and nothing else is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m3e import BundleError
from m3e.manifest import Golden, Manifest, decode_array, encode_array
from m3e_export.graphs import KINDS
from tests.trust import hostile

any_text = st.text(max_size=20)


@pytest.fixture(scope="module")
def data(tiny_bundle: Path) -> bytes:
    return (tiny_bundle / "manifest.json").read_bytes()


def seal(content: dict[str, Any]) -> bytes:
    """Serialise with a hash that is right, so that a test is about the content alone."""

    def canonical() -> bytes:
        return (json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()

    content.pop("manifest_sha256", None)
    content["manifest_sha256"] = hashlib.sha256(canonical()).hexdigest()
    return canonical()


def test_the_bytes_come_back(data: bytes) -> None:
    assert Manifest.from_bytes(data).to_bytes() == data
    assert seal(json.loads(data)) == data


@settings(deadline=None)
@example(prompts={"lone": "\ud800"}, golden=[Golden(text="", input_ids=())], tolerance=5e-324, name="\udfff")
@given(
    prompts=st.dictionaries(any_text, any_text, max_size=3),
    golden=st.lists(
        st.builds(Golden, text=any_text, input_ids=st.lists(st.integers()).map(tuple)), min_size=1, max_size=3
    ),
    tolerance=st.floats(0, 1e-2, exclude_min=True),
    name=st.none() | any_text,
)
def test_any_content_comes_back(
    data: bytes, prompts: dict[str, str], golden: list[Golden], tolerance: float, name: str | None
) -> None:
    manifest = Manifest.from_bytes(data)
    changed = dataclasses.replace(
        manifest,
        model=dataclasses.replace(manifest.model, prompts=prompts, default_prompt_name=name),
        golden=tuple(golden),
        graphs=(dataclasses.replace(manifest.graphs[0], canary_tolerance=tolerance, certificate=None),),
    )
    assert Manifest.from_bytes(changed.to_bytes()) == changed


def test_every_flipped_byte_is_refused(data: bytes) -> None:
    rng = np.random.default_rng(0)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= rng.choice([0x01, 0x20, 0x80, 0xFF, data[position]])  # case, sign, all bits, NUL
        with pytest.raises(BundleError, match=r"manifest\.json"):
            Manifest.from_bytes(bytes(damaged))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda data: b"", "is not JSON", id="empty"),
        pytest.param(lambda data: data[:-2], "is not JSON", id="cut"),
        pytest.param(lambda data: data.replace(b"m3e-tiny", b"m3e-tinz"), "does not match its own hash", id="edited"),
        pytest.param(lambda data: data[:-1], "canonical form", id="no last newline"),
        pytest.param(lambda data: data + b"\n", "canonical form", id="one more newline"),
        pytest.param(lambda data: data + b"{}", "is not JSON", id="more behind it"),
        pytest.param(lambda data: data.replace(b"\n", b""), "canonical form", id="other spaces"),
        pytest.param(lambda data: data[:2] + b' "files": {},\n' + data[2:], "canonical form", id="a field twice"),
        pytest.param(lambda data: data.decode().encode("utf-16"), "canonical form", id="UTF-16"),
        pytest.param(lambda data: b"\xff\xfe\xfd", "is not JSON", id="not text"),
        pytest.param(lambda data: b"[" * 200_000, "is not JSON", id="nested too deep"),
        pytest.param(lambda data: b"[1]", "has no format_version", id="a list"),
        pytest.param(lambda data: b"null", "has no format_version", id="null"),
        pytest.param(lambda data: b'{"a": 1}', "has no format_version", id="of something else"),
        pytest.param(lambda data: b'{"format_version": 1}', "does not match its own hash", id="no hash"),
    ],
)
def test_damage_is_refused(data: bytes, damage: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(BundleError, match=rf"manifest\.json.*{message}"):
        Manifest.from_bytes(damage(data))


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("extra", 1, "manifest.json has an unknown field 'extra'"),
        ("graphs.0.certificate.extra", 1, "manifest.json.graphs[0].certificate has an unknown field 'extra'"),
        ("space_id", ..., "manifest.json has no field 'space_id'"),
        ("model.pooling", ..., "manifest.json.model has no field 'pooling'"),
        ("files.vocab.txt.sha256", ..., "manifest.json.files.vocab.txt has no field 'sha256'"),
        ("format_version", True, "manifest.json.format_version is bool, expected int"),
        ("model", None, "manifest.json.model is NoneType, expected an object"),
        ("model.embedding_dim", "64", "manifest.json.model.embedding_dim is str, expected int"),
        ("model.normalize", 0, "manifest.json.model.normalize is int, expected bool"),
        ("model.pooling", "mean", "manifest.json.model.pooling is str, expected tuple"),
        ("model.prompts", ["q"], "manifest.json.model.prompts is list, expected dict"),
        ("model.prompts", {"query": 1}, "manifest.json.model.prompts.query is int, expected str"),
        ("graphs", {}, "manifest.json.graphs is dict, expected tuple"),
        ("graphs.0.certificate.tolerance", 1, "manifest.json.graphs[0].certificate.tolerance is int, expected float"),
        ("golden.2.input_ids.1", None, "manifest.json.golden[2].input_ids[1] is NoneType, expected int"),
        ("files", [], "manifest.json.files is list, expected dict"),
        ("files.vocab.txt.size_bytes", 1.5, "manifest.json.files.vocab.txt.size_bytes is float, expected int"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(data: bytes, path: str, value: object, problem: str) -> None:
    content = json.loads(data)
    put(content, path, value)
    with pytest.raises(BundleError) as caught:
        Manifest.from_bytes(seal(content))
    assert str(caught.value) == problem


def put(content: Any, path: str, value: object) -> None:
    """Set the field at a dotted path, or remove it for ``...``."""
    *above, last = path.replace("vocab.txt", "vocab/txt").split(".")
    for key in above:
        content = content[int(key) if isinstance(content, list) else key.replace("/", ".")]
    if value is ...:
        del content[last]
    else:
        content[int(last) if isinstance(content, list) else last] = value


@pytest.mark.parametrize("name", hostile.MANIFESTS)
def test_a_value_out_of_range_is_named(data: bytes, name: str) -> None:
    change, problem = hostile.MANIFESTS[name]
    with pytest.raises(BundleError) as caught:
        Manifest.from_bytes(change(Manifest.from_bytes(data)).to_bytes())
    assert str(caught.value).startswith(f"manifest.json.{problem}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format_version", 1),  # nothing changed
        ("model.max_seq_length", 3),
        ("model.vocab_size", 2**24),
        ("graphs.0.canary_tolerance", max(kind.canary_tolerance for kind in KINDS)),
        ("graphs.0.canary_tolerance", min(kind.canary_tolerance for kind in KINDS)),
    ],
)
def test_what_exporters_write_is_in_range(data: bytes, path: str, value: object) -> None:
    content = json.loads(data)
    put(content, path, value)
    Manifest.from_bytes(seal(content))


def test_all_problems_are_in_one_message(data: bytes) -> None:
    content = json.loads(data)
    put(content, "model.embedding_dim", "64")
    put(content, "source.id", ...)
    put(content, "files.vocab.txt.size_bytes", None)
    with pytest.raises(BundleError, match=r"model.embedding_dim.*source has no field 'id'.*vocab.txt.size_bytes"):
        Manifest.from_bytes(seal(content))


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_format_version_is_refused(
    data: bytes, version: object, record_property: Callable[[str, str], None]
) -> None:
    content = {**json.loads(data), "format_version": version, "of": "the future"}
    with pytest.raises(BundleError) as caught:
        Manifest.from_bytes(seal(content))
    assert f"has format version {version!r}, this m3e reads 1" in str(caught.value)
    assert "convert the checkpoint again" in str(caught.value)
    record_property("B8", f"version {version!r} is refused")


def test_arrays_come_back() -> None:
    array = np.array([[1.5, -0.0, np.pi], [np.inf, 1e-45, -3e38]], dtype=np.float32)
    decoded = decode_array(encode_array(array), (2, 3))
    assert decoded.dtype == np.float32
    assert decoded.tobytes() == array.tobytes()
    assert encode_array(array.astype(">f4")) == encode_array(array) == encode_array(np.asfortranarray(array))


@pytest.mark.parametrize("text", ["", "AAAA", "AAAAAA==", "AAAAAAAA", "A" * 128, f"{'A' * 32}!", "é" * 32, "AAAAA"])
def test_an_array_of_another_size_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json: expected a base64 float32 array of shape \(2, 3\)"):
        decode_array(text, (2, 3))
