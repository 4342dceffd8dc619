from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.server_process import running
from m3e import AsyncEncoder, Batcher, CertificateError, Encoder, ExportError
from m3e.bundle import Bundle
from m3e.cpu import cpu_features
from m3e.plan import SPREAD, attention_length
from m3e.session import Session
from m3e_export import certify, quantize
from m3e_export.calibrate import calibrate
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.encoder_math import attention
from m3e_export.fit import Int8Site, centre, fit_attention, fit_site, round_weights
from m3e_export.graph import build_graph
from m3e_export.graph_tensorrt import fold_divisors
from m3e_export.int8 import Int8Steps, quantize_rows
from m3e_export.pipeline import convert
from m3e_export.sources import fetch_checkpoint
from tests.trust.models import tiny_bundle

Array = np.ndarray[Any, Any]
# What this processor has: on one without VNNI the exporter makes 7-bit weights.
HERE = cpu_features() or frozenset()


@pytest.fixture(scope="module")
def bundle() -> Path:
    return tiny_bundle()


@pytest.fixture(scope="module")
def encoder(bundle: Path) -> Encoder:
    return Encoder(bundle, precision="int8")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(fetch_checkpoint(str(tiny_checkpoint)))


@pytest.fixture(scope="module")
def sites(checkpoint: Checkpoint) -> dict[str, Int8Site]:
    return quantize.quantize(checkpoint, max_level=127 if "vnni" in HERE else 63)


def build_int8(checkpoint: Checkpoint, sites: dict[str, Int8Site], **options: bool) -> onnx.ModelProto:
    steps = functools.partial(Int8Steps, sites=sites, signed="vnni" in HERE)
    return build_graph(checkpoint, steps, **options)


def unit(vectors: Array) -> Array:
    rows: Array = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return rows


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_vector_is_the_same_to_the_last_bit_whoever_the_neighbours_are(
    bundle: Path, sentences: list[str], precision: str
) -> None:
    encoder = Encoder(bundle, precision=precision)
    texts = [text for text in sentences if len(text) < 300][::9]
    alone = np.stack([encoder.encode(text) for text in texts])
    np.testing.assert_array_equal(encoder.encode(texts), alone)
    rng = np.random.default_rng(0)
    for _ in range(100):
        some = rng.choice(len(texts), rng.integers(2, 40))
        batch_size = int(rng.integers(1, 20))
        np.testing.assert_array_equal(encoder.encode([texts[i] for i in some], batch_size=batch_size), alone[some])


def test_threads_change_nothing(bundle: Path, sentences: list[str]) -> None:
    one, two = (Encoder(bundle, precision="int8", num_threads=n).encode(sentences[:60]) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_it_is_close_to_fp32_on_texts_that_calibration_did_not_see(bundle: Path, encoder: Encoder) -> None:
    texts = [f"第{i}个句子，谈一谈第{i * 7}号问题。" for i in range(100)]
    exact = unit(Encoder(bundle, precision="fp32").encode(texts))
    assert (exact * unit(encoder.encode(texts))).sum(axis=1).min() > 0.999


def test_auto_takes_int8_and_the_manifest_says_what_was_chosen(bundle: Path) -> None:
    encoder = Encoder(bundle)
    assert encoder.precision == "int8"
    graph = encoder.manifest.graphs[1]
    expected = ("onnx/model_int8.onnx", ("vnni",)) if "vnni" in HERE else ("onnx/model_int8_avx2.onnx", ())
    assert (graph.file, graph.cpu_features) == expected
    assert set(graph.int8_sites) == {
        f"encoder.layer.{i}.{part}"
        for i in range(2)
        for part in ("attention.self", "attention.output", "intermediate", "output")
    }
    assert all(0 < site.relative_error < 0.1 for site in graph.int8_sites.values())
    assert graph.certificate is not None
    assert not graph.certificate.accepted


def test_the_graph_computes_what_calibration_computed(checkpoint: Checkpoint, sites: dict[str, Int8Site]) -> None:
    """One linear layer: the session's output against numpy's arithmetic on the same levels."""
    model = build_int8(checkpoint, sites)
    node = next(node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat")
    source = next(other for other in model.graph.node if node.input[0] in other.output)
    before = source.input[0]
    for name in (before, node.output[0]):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = Session(model.SerializeToString(), num_threads=1)
    ids = [[2, 300, 400, 500, 3]]
    x, y = session.run(ids, output=before), session.run(ids, output=node.output[0])
    site = sites["encoder.layer.0.attention.self"]
    if site.divisor is not None:  # the multiplication stands before the value that was read
        site = dataclasses.replace(site, divisor=None)
    assert site.attention is not None
    expected = site.apply("encoder.layer.0.attention.self.query", site.quantize(x)) / site.attention.query
    np.testing.assert_allclose(y, expected, atol=1e-3)  # in steps, up to 127 of them


def test_the_graph_loses_what_calibration_said_that_it_would(checkpoint: Checkpoint) -> None:
    """With queries and keys so large that attention chooses, as trained weights do."""
    tensors = {
        name: tensor * np.float32(20 if ".query." in name or ".key." in name else 1)
        for name, tensor in checkpoint.tensors.items()
    }
    checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
    ids = quantize.calibration_ids(checkpoint, None)[:150]
    levels, scales = quantize_rows(checkpoint.tensors["embeddings.word_embeddings.weight"])
    sites, cosines = calibrate(checkpoint, ids, levels * scales, max_level=127 if "vnni" in HERE else 63)
    exact, quantized = (
        Session(model.SerializeToString(), num_threads=1)
        for model in (build_graph(checkpoint), build_int8(checkpoint, sites))
    )
    found = [(unit(exact.run([text])) * unit(quantized.run([text]))).sum(dtype=np.float64) for text in ids]
    np.testing.assert_allclose(1 - np.mean(found), 1 - cosines.mean(dtype=np.float64), rtol=0.05)


def test_no_token_depends_on_the_width_of_the_rectangle_to_the_last_bit(
    checkpoint: Checkpoint, sites: dict[str, Int8Site]
) -> None:
    model = build_int8(checkpoint, sites, with_token_embeddings=True)
    session = Session(model.SerializeToString(), num_threads=1)
    rng = np.random.default_rng(0)
    for n_tokens in (2, 7, 16, 33, 64, 100):
        text, neighbour = (rng.integers(1000, 20000, n).tolist() for n in (n_tokens, 120))
        alone = session.run([text], n_tokens, "last_hidden_state")[0]
        for width in (n_tokens + 1, n_tokens + 9, 120):
            np.testing.assert_array_equal(session.run([text], width, "last_hidden_state")[0, :n_tokens], alone)
        beside = session.run([neighbour, text], 120, "last_hidden_state")[1, :n_tokens]
        np.testing.assert_array_equal(beside, alone)


def test_no_vector_depends_on_the_width_to_the_last_bit_so_texts_of_several_widths_share_a_batch(
    bundle: Path, encoder: Encoder
) -> None:
    assert encoder.mixes_widths
    assert not Encoder(bundle, precision="fp32").mixes_widths
    session = Session(Bundle(bundle).read_graph(encoder.manifest.graphs[1]), num_threads=1, mixed=True)
    rng = np.random.default_rng(0)
    for n_tokens in (*range(2, 70), 99, 130, 255):
        text = rng.integers(1000, 20000, n_tokens).tolist()
        alone = session.run([text])[0]
        for width in range(-(-n_tokens // 4) * 4, n_tokens + SPREAD + 4, 4):
            neighbour = rng.integers(1000, 20000, width).tolist()
            np.testing.assert_array_equal(session.run([neighbour, text, neighbour], width)[1], alone)


@pytest.mark.parametrize(("precision", "n_batches"), [("int8", 1), ("fp32", 3)])
def test_whoever_shares_batches_does_so_by_what_the_graph_bears(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, precision: str, n_batches: int
) -> None:
    encoder = Encoder(bundle, precision=precision, num_threads=1)
    texts = ["天" * n for n in (5, 12, 19)]
    expected = np.stack([encoder.encode(text) for text in texts])
    seen, embed = list[int](), encoder.embed

    def counting(input_ids: Sequence[list[int]]) -> Array:
        seen.append(len(input_ids))
        return embed(input_ids)

    async def shared() -> Array:
        async with AsyncEncoder(encoder) as shared:
            return await shared.encode(texts)

    monkeypatch.setattr(encoder, "embed", counting)
    with Batcher(encoder) as batcher:
        np.testing.assert_array_equal(batcher.encode(texts), expected)
    np.testing.assert_array_equal(asyncio.run(shared()), expected)
    assert len(seen) == 2 * n_batches
    with running(bundle, "--precision", precision, "--threads", "1") as server:
        found = server.post("/embed", {"inputs": texts, "normalize": False})
        assert f"m3e_batch_texts_count {n_batches}.0" in server.get("/metrics").body.decode()
    np.testing.assert_allclose(unit(np.array(json.loads(found.body))), unit(expected), atol=1e-6)


def test_sites_that_are_kept_stay_fp32(
    checkpoint: Checkpoint, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "GOOD_MEAN", 1.1)  # never good enough: the last rung is taken
    sites = quantize.quantize(checkpoint, sentences[::25])
    assert not any(name.endswith(".output") and "attention" not in name for name in sites)
    model = build_int8(checkpoint, sites)
    counts = {op: sum(node.op_type == op for node in model.graph.node) for op in ("Gemm", "MatMulIntegerToFloat")}
    # Of each layer: query, key with value, attention's three products, its output layer, the first of feed-forward.
    assert counts == {"Gemm": 2, "MatMulIntegerToFloat": 14}


def test_accuracy_beyond_the_tolerance_is_refused_or_accepted_and_recorded(
    tiny_checkpoint: Path, few_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(certify.TOLERANCE, "int8", 1e-9)
    make = functools.partial(convert, str(tiny_checkpoint), precisions=("int8",), calibration=few_texts)
    with pytest.raises(CertificateError, match="--accept-accuracy"):
        make(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    manifest = make(tmp_path / "taken", accept_accuracy=True)
    assert manifest.graphs[0].certificate is not None
    assert manifest.graphs[0].certificate.accepted


@pytest.mark.parametrize(
    ("content", "message"), [(b"a\n" * 9, "9 texts"), (b"\xff\xfe", "UTF-8")], ids=["few", "bytes"]
)
def test_a_calibration_file_that_cannot_serve(
    tiny_checkpoint: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "texts").write_bytes(content)
    with pytest.raises(ExportError, match=message):
        convert(str(tiny_checkpoint), tmp_path / "out", precisions=("int8",), calibration=tmp_path / "texts")


def test_rounding_with_compensation_beats_rounding_to_nearest() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4000, 8)) @ rng.standard_normal((8, 64)) + 0.05 * rng.standard_normal((4000, 64))).astype(
        np.float32
    )  # correlated channels, as activations have
    weight = rng.standard_normal((64, 16)).astype(np.float32)
    target = x @ weight
    levels, scale = round_weights(weight, x, target, 7)
    nearest_scale = np.abs(weight).max(axis=0) / 7
    nearest = np.rint(weight / nearest_scale) * nearest_scale
    assert np.abs(levels).max() <= 7
    assert np.square(target - x @ (levels * scale)).mean() < 0.3 * np.square(target - x @ nearest).mean()


def test_the_value_projection_takes_over_the_division_before_the_output_projection() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 8)).astype(np.float32) * np.array([1, 1, 1, 1, 1, 1, 1, 30], np.float32)
    weights = [rng.standard_normal((8, 8)).astype(np.float32) for _ in range(4)]
    names = [f"a.attention.self.{name}" for name in ("query", "key", "value")]
    first = fit_site(names, weights[:3], [x @ weight for weight in weights[:3]], x, 127)
    value = first.apply(names[2], first.quantize(x))
    second = fit_site(["a.attention.output.dense"], weights[3:], [value @ weights[3]], value, 127)
    divisor = np.linspace(0.5, 2, 8, dtype=np.float32)
    divided = dataclasses.replace(second, divisor=divisor)
    folded = fold_divisors({"a.attention.self": first, "a.attention.output": divided})
    assert folded["a.attention.output"].divisor is None
    np.testing.assert_allclose(
        folded["a.attention.self"].apply(names[2], first.quantize(x)), value / divisor, rtol=1e-5
    )


def test_attention_loses_little_in_its_steps_and_nothing_by_centring() -> None:
    """Against FP32 attention of the same values, which stand far from zero; one channel of either is dead."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 16)).astype(np.float32)
    weights = [0.3 * rng.standard_normal((16, 16)).astype(np.float32) for _ in range(3)]
    names = [f"a.self.{name}" for name in ("query", "key", "value")]
    site = fit_site(names, weights, [x @ weight + 9 * (i > 0) for i, weight in enumerate(weights)], x, 127)
    levels = site.quantize(x)
    query, key, value = (site.apply(name, levels) for name in names)
    query[:, 3] = key[:, 5] = 0
    _, centred_key = centre(site, names[1], key)
    centred, centred_value = centre(site, names[2], value)
    parts = query, centred_key, centred_value
    np.testing.assert_allclose(centred.apply(names[2], levels), centred_value, atol=1e-5)
    np.testing.assert_allclose(centred_value.min(axis=0), -centred_value.max(axis=0), rtol=1e-4)

    steps = fit_attention(*parts)
    np.testing.assert_allclose(steps.query * steps.key, steps.query[0] * steps.key[0], rtol=1e-5)
    rounded = steps.round(*parts)
    for part, exact, step in zip(rounded, parts, (steps.query, steps.key, steps.value), strict=True):
        assert (np.abs(part - exact) <= step * 0.501).all()  # nothing that was seen is clipped

    shift = site.linears[names[2]].bias - centred.linears[names[2]].bias
    expected = attention(query[None], key[None], value[None], 2)
    found = attention(rounded[0][None], rounded[1][None], rounded[2][None], 2, rounded=True) + shift
    assert np.abs(found - expected).max() < 0.05 * (expected - shift).std()


def test_rounded_weights_count_the_largest_of_their_row_as_255() -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 1, 9, 4))
    expected = np.empty((9, 4))
    for row, q in enumerate(query[0]):
        scores = [q @ k / 2 for k in key[0]]  # the root of four channels
        counts = [round(255 * math.exp(score - max(scores))) for score in scores]
        expected[row] = sum(count * v for count, v in zip(counts, value[0], strict=True)) / sum(counts)
    np.testing.assert_allclose(attention(query, key, value, 1, rounded=True)[0], expected, rtol=1e-12, atol=1e-12)


def test_levels_are_clipped_to_a_byte_and_zero_is_exact() -> None:
    site = Int8Site({}, None, 0.1, 100, 0.0, 0.0)
    levels = site.quantize(np.array([[-100, -0.04, 0, 0.1, 100]], np.float32))
    assert levels.tolist() == [[-100, 0, 0, 1, 155]]


def test_rows_are_quantised_by_their_own_largest_value() -> None:
    rows = np.array([[1, -2, 0.5], [0, 0, 0], [1e-3, 1e-4, 0]], np.float32)
    levels, scales = quantize_rows(rows)
    assert np.abs(levels).max(axis=1).tolist() == [127, 0, 127]
    np.testing.assert_allclose(levels * scales, rows, atol=2 / 127 / 2)


def test_attention_lengths_depend_on_the_text_alone() -> None:
    lengths = attention_length(np.arange(1, 513))
    assert (lengths >= np.arange(1, 513)).all()
    assert lengths[:9].tolist() == [4, 4, 4, 4, 8, 8, 8, 8, 12]
    assert lengths[64:].tolist() == list(range(65, 513))
