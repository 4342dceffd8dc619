"""What is done to vectors, against sentence-transformers doing the same."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sentence_transformers import util

from m3e import InputError, quantize_embeddings, similarity
from m3e.vectors import EmbeddingPrecision, Float32Array, normalize

REFERENCE = {
    "cosine": util.cos_sim,
    "dot": util.dot_score,
    "euclidean": util.euclidean_sim,
    "manhattan": util.manhattan_sim,
}

matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 40)), elements=st.floats(-8, 8, width=32))


def vectors(rows: int, dim: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)


def ranges(dim: int) -> Float32Array:
    """Ranges that differ from dimension to dimension; values of ``matrices`` lie inside all but the first."""
    widths = np.arange(dim, dtype=np.float32)
    return np.stack([-7 - widths, 7 + widths**2])


def assert_equal(actual: np.ndarray[Any, Any], expected: object) -> None:
    expected = np.asarray(expected)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


@given(embeddings=matrices, precision=st.sampled_from(get_args(EmbeddingPrecision)))
def test_quantised_vectors_are_those_of_sentence_transformers(
    embeddings: Float32Array, precision: EmbeddingPrecision
) -> None:
    limits = ranges(embeddings.shape[1])
    expected = util.quantize_embeddings(embeddings, precision, limits)
    assert_equal(quantize_embeddings(embeddings, precision, limits), expected)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("int8", np.int8), ("uint8", np.uint8), ("binary", np.int8), ("ubinary", np.uint8)]
)
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("dim", [1, 7, 8, 9, 64, 100])
def test_shapes(precision: EmbeddingPrecision, dtype: type, rows: int, dim: int) -> None:
    quantised = quantize_embeddings(vectors(rows, dim), precision, ranges(dim))
    assert quantised.shape == (rows, -(-dim // 8) if "binary" in precision else dim)
    assert quantised.dtype == dtype


@pytest.mark.parametrize(
    ("value", "level"),
    [(-1e30, 0), (-1.01, 0), (-1.0, 0), (0.0, 127), (0.99, 253), (1.01, 255), (1.3, 255), (300.0, 255)],
)
def test_values_outside_the_ranges_are_clipped(value: float, level: int) -> None:
    embeddings, limits = np.array([[value]], dtype=np.float32), np.array([[-1], [1]], dtype=np.float32)
    assert quantize_embeddings(embeddings, "uint8", limits).tolist() == [[level]]
    assert quantize_embeddings(embeddings, "int8", limits).tolist() == [[level - 128]]


def test_a_dimension_that_never_changes() -> None:
    embeddings, limits = np.array([[1, 2, 2.001, 3]], dtype=np.float32), np.full((2, 4), 2, dtype=np.float32)
    quantised = quantize_embeddings(embeddings, "uint8", limits)
    assert_equal(quantised, util.quantize_embeddings(embeddings, "uint8", limits))
    assert quantised.tolist() == [[0, 0, 0, 1]]


def test_bits_and_their_order() -> None:
    embeddings = np.array([[1, -1, 0, 2, -0.0, 1e-30, -3, 1, 5]], dtype=np.float32)
    assert quantize_embeddings(embeddings, "ubinary").tolist() == [[0b10010101, 0b10000000]]
    assert quantize_embeddings(embeddings, "binary").tolist() == [[0b10010101 - 128, 0b10000000 - 128]]


def test_the_same_text_gets_the_same_bytes_in_every_call() -> None:
    embeddings = vectors(16, 24)
    alone = [quantize_embeddings(row[None], "int8", ranges(24))[0] for row in embeddings]
    assert_equal(quantize_embeddings(embeddings, "int8", ranges(24)), np.stack(alone))


@pytest.mark.parametrize(
    ("precision", "limits", "message"),
    [
        pytest.param("int4", None, "unknown precision 'int4', expected one of float32, int8, uint8, binary", id="name"),
        pytest.param("int8", None, r"int8 needs ranges of shape \(2, 4\), received none", id="no ranges"),
        pytest.param("uint8", ranges(5), r"uint8 needs ranges .* received shape \(2, 5\)", id="other dimensions"),
        pytest.param("int8", ranges(4)[0], r"int8 needs ranges .* received shape \(4,\)", id="one row"),
    ],
)
def test_quantising_refuses(precision: Any, limits: Float32Array | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_embeddings(vectors(2, 4), precision, limits)


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 3), (40, 7)])
def test_similarity_is_that_of_sentence_transformers(name: str, n: int, m: int) -> None:
    a, b = vectors(n, 33), vectors(m, 33, seed=1)
    actual = similarity(a, b, name)
    assert actual.dtype == np.float32
    expected: Float32Array = REFERENCE[name](a, b).numpy()
    assert actual.shape == expected.shape == (n, m)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize(("n", "m"), [(0, 2), (2, 0), (0, 0)])
def test_similarity_of_nothing(name: str, n: int, m: int) -> None:
    assert similarity(np.zeros((n, 4)), np.zeros((m, 4)), name).shape == (n, m)


@pytest.mark.parametrize("name", REFERENCE)
def test_similarity_of_single_vectors_lists_and_whole_numbers(name: str) -> None:
    expected = REFERENCE[name](np.array([[3.0, 4.0]]), np.array([[0.0, 2.0]])).numpy()
    pairs: list[tuple[Any, Any]] = [
        ([3, 4], [0, 2]),
        ([[3, 4]], np.array([0, 2])),
        (np.array([3.0, 4.0]), [[0.0, 2.0]]),
    ]
    for a, b in pairs:
        np.testing.assert_allclose(similarity(a, b, name), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "name", "message"),
    [
        pytest.param(np.zeros((1, 3)), np.zeros((1, 4)), "cosine", "of 3 and 4 dimensions", id="dimensions"),
        pytest.param(np.zeros((1, 2, 3)), np.zeros(3), "dot", r"received shape \(1, 2, 3\)", id="rank"),
        pytest.param(np.zeros(3), np.zeros(3), "angular", "unknown similarity 'angular', expected cosine", id="name"),
    ],
)
def test_similarity_refuses(a: Float32Array, b: Float32Array, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        similarity(a, b, name)


def test_normalize() -> None:
    rows = np.array([[3, 4], [0, 0], [1e-20, 0], [-2, 0]], dtype=np.float32)
    before = rows.copy()
    unit = normalize(rows)
    assert unit.dtype == np.float32
    expected: Float32Array = np.array([[0.6, 0.8], [0, 0], [1e-8, 0], [-1, 0]], dtype=np.float32)
    np.testing.assert_allclose(unit, expected, rtol=1e-6)
    np.testing.assert_allclose(unit, util.normalize_embeddings(torch.from_numpy(rows)).numpy(), rtol=1e-6)
    np.testing.assert_array_equal(rows, before)
