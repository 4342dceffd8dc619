from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from m3e import CertificateError, Encoder, ExportError
from m3e.cpu import cpu_features
from m3e.plan import attention_length
from m3e.session import Session
from m3e_export import certify, quantize
from m3e_export.calibrate import Int8Site, fit_site, round_weights
from m3e_export.checkpoint import Checkpoint, load_checkpoint
from m3e_export.graph import build_graph
from m3e_export.int8 import Int8Weights, fold_divisors, quantize_rows
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


def test_the_graph_computes_what_calibration_computed(checkpoint: Checkpoint) -> None:
    """One linear layer: the session's output against numpy's arithmetic on the same levels."""
    sites = quantize.quantize(checkpoint, max_level=127 if "vnni" in HERE else 63)
    model = build_graph(checkpoint, Int8Weights(checkpoint, sites))
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
    np.testing.assert_allclose(y, site.apply("encoder.layer.0.attention.self.query", site.quantize(x)), atol=1e-4)


def test_sites_that_are_kept_stay_fp32(
    checkpoint: Checkpoint, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "GOOD_MEAN", 1.1)  # never good enough: the last rung is taken
    sites = quantize.quantize(checkpoint, sentences[::25])
    assert not any(name.endswith(".output") and "attention" not in name for name in sites)
    model = build_graph(checkpoint, Int8Weights(checkpoint, sites))
    counts = {op: sum(node.op_type == op for node in model.graph.node) for op in ("Gemm", "MatMulIntegerToFloat")}
    assert counts == {"Gemm": 2, "MatMulIntegerToFloat": 10}


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
