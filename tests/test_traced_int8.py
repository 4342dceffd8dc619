"""A graph of unknown architecture in INT8, against the same in numpy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from m3e import CheckpointError
from m3e.cpu import cpu_features
from m3e.session import Session
from m3e_export import traced_int8
from m3e_export.builder import RECTANGLE, GraphBuilder
from m3e_export.fit import Int8Site, fit_site
from m3e_export.traced_int8 import quantize_traced, to_int8

WORDS, WIDTH, INNER = 50, 24, 96
MAX_LEVEL = 127 if "vnni" in (cpu_features() or ()) else 63
RNG = np.random.default_rng(0)
MATRICES = {
    name: RNG.standard_normal(shape, dtype=np.float32) / np.float32(shape[0] ** 0.5)
    for name, shape in {"words": (WORDS, WIDTH), "wide": (WIDTH, INNER), "narrow": (INNER, WIDTH),
                        "side": (WIDTH, WIDTH), "bias": (1, INNER)}.items()
}  # fmt: skip
TEXTS = [RNG.integers(0, WORDS, length).tolist() for length in (3, 3, 5, 8, 8, 8, 13, *[20] * 20)]
FIRST, SECOND = "x", "inner"  # the two sites


def make_model(*, branch: bool = False) -> onnx.ModelProto:
    """Words, a block with a linear layer beside it, and the mean: with products as a tracer leaves them."""
    b = GraphBuilder({"input_ids": RECTANGLE, "attention_mask": RECTANGLE})
    names = {name: b.const(name, matrix) for name, matrix in MATRICES.items()}
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", names["wide"]], ["wide_product"]),
        helper.make_node("Add", ["wide_product", names["bias"]], ["biased"]),
        helper.make_node("Relu", ["biased"], ["inner"]),
        helper.make_node("MatMul", ["inner", names["narrow"]], ["narrow_product"]),
        helper.make_node("MatMul", ["x", names["side"]], ["side_product"]),  # reads the first site, and comes last
        helper.make_node("Add", ["narrow_product", "side_product"], ["last"]),
        helper.make_node("Unsqueeze", ["attention_mask", b.int64(2)], ["mask"]),
        helper.make_node("Cast", ["mask"], ["float_mask"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["last", "float_mask"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", b.int64(1)], ["pooled"], keepdims=0),
    ]
    if branch:  # one way adds a product of its own with a matrix that the first site has too
        yes = helper.make_graph(
            [helper.make_node("MatMul", ["masked", "side"], ["yes"])], "yes", [], [onnx.ValueInfoProto(name="yes")]
        )
        no = helper.make_graph(
            [helper.make_node("Identity", ["masked"], ["no"])], "no", [], [onnx.ValueInfoProto(name="no")]
        )
        always = b.const("always", True, np.bool_)
        nodes[-1:] = [
            helper.make_node("If", [always], ["chosen"], then_branch=yes, else_branch=no),
            helper.make_node("ReduceSum", ["chosen", b.int64(1)], ["pooled"], keepdims=0),
        ]
    b.include(nodes, [])
    return b.finish({"sentence_embedding": ("pooled", ["batch", WIDTH])})


def embed(model: onnx.ModelProto, texts: list[list[int]]) -> Any:
    return Session(model.SerializeToString(), num_threads=1).run(texts)


def in_numpy(sites: dict[str, Int8Site], ids: list[int]) -> Any:
    """The INT8 graph on one text; products in no site are exact."""

    def product(site: str, output: str, matrix: str, value: Any) -> Any:
        return sites[site].apply(output, sites[site].quantize(value)) if site in sites else value @ MATRICES[matrix]

    rows = MATRICES["words"]
    scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    x = (np.rint(rows / scales) * scales)[ids]
    inner = np.maximum(product(FIRST, "wide_product", "wide", x) + MATRICES["bias"], 0)
    last = product(SECOND, "narrow_product", "narrow", inner) + product(FIRST, "side_product", "side", x)
    return last.sum(axis=0)


@pytest.fixture(scope="module")
def sites() -> dict[str, Int8Site]:
    return quantize_traced(make_model(), TEXTS, max_level=MAX_LEVEL)


def test_products_of_one_value_are_one_site(sites: dict[str, Int8Site]) -> None:
    assert {name: list(site.linears) for name, site in sites.items()} == {
        FIRST: ["wide_product", "side_product"],
        SECOND: ["narrow_product"],
    }


@pytest.mark.parametrize("chosen", [(FIRST, SECOND), (FIRST,), (SECOND,), ()], ids=str)
def test_the_graph_computes_what_its_sites_say(sites: dict[str, Int8Site], chosen: tuple[str, ...]) -> None:
    some = {name: sites[name] for name in chosen}
    model = to_int8(make_model(), some)
    vectors = embed(model, TEXTS)
    np.testing.assert_allclose(vectors, [in_numpy(some, ids) for ids in TEXTS], atol=2e-5)
    exact = embed(make_model(), TEXTS)
    assert np.abs(vectors - exact).max() > 1e-4  # the words at least are rounded
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(exact, axis=1)
    assert ((vectors * exact).sum(axis=1) / norms).min() > 0.999


def test_a_text_does_not_depend_on_its_neighbours(sites: dict[str, Int8Site]) -> None:
    model = to_int8(make_model(), sites)
    outlier = [int(np.abs(MATRICES["words"]).max(axis=1).argmax())] * 20
    beside = embed(model, [*TEXTS, outlier])[: len(TEXTS)]
    # The sum over the tokens is ReduceSum's, whose order depends on the batch.
    np.testing.assert_allclose(beside, np.concatenate([embed(model, [ids]) for ids in TEXTS]), atol=2e-5)


@pytest.mark.parametrize("branch", [False, True])
def test_no_matrix_is_kept_that_nothing_reads(sites: dict[str, Int8Site], branch: bool) -> None:
    exact = make_model(branch=branch)
    model = to_int8(exact, sites)
    floats = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name in MATRICES
    }
    assert floats == {"bias", *(["side"] if branch else [])}
    found, expected = embed(model, TEXTS), embed(exact, TEXTS)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_calibration_goes_through_branches() -> None:
    assert set(quantize_traced(make_model(branch=True), TEXTS, max_level=MAX_LEVEL)) == {FIRST, SECOND}


def test_where_cosines_are_low_layers_that_narrow_stay_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced_int8, "GOOD_MEAN", 1.1)  # no cosine is
    lines: list[str] = []
    assert set(quantize_traced(make_model(), TEXTS, max_level=MAX_LEVEL, report=lines.append)) == {FIRST}
    assert [line for line in lines if "layers that narrow in FP32" in line] == lines[2:3]


def test_a_site_makes_good_what_the_one_before_has_lost(sites: dict[str, Int8Site]) -> None:
    """The second site's bias takes up the first one's mean error, which this test makes large."""

    def worse(names: list[str], *rest: Any) -> Int8Site:
        site = fit_site(names, *rest)
        if names == ["narrow_product"]:
            return site
        linears = {name: dataclasses.replace(linear, bias=linear.bias + 1) for name, linear in site.linears.items()}
        return dataclasses.replace(site, linears=linears)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traced_int8, "fit_site", worse)
        patch.setattr(traced_int8, "GOOD_MIN", -1)
        patch.setattr(traced_int8, "GOOD_MEAN", -1)
        found = quantize_traced(make_model(), TEXTS, max_level=MAX_LEVEL)
    shift = found[SECOND].linears["narrow_product"].bias - sites[SECOND].linears["narrow_product"].bias
    x = MATRICES["words"][np.concatenate(TEXTS)]
    inner = x @ MATRICES["wide"] + MATRICES["bias"]
    gain = (np.maximum(inner + 1, 0) - np.maximum(inner, 0)).mean(axis=0) @ MATRICES["narrow"]
    assert np.corrcoef(shift, -gain)[0, 1] > 0.9


def test_a_graph_without_linear_layers_is_refused() -> None:
    model = make_model()
    for tensor in model.graph.initializer:  # as one that multiplies by what it computes
        if tensor.name in ("wide", "narrow", "side"):
            matrix = numpy_helper.to_array(tensor)[None]
            tensor.CopyFrom(numpy_helper.from_array(matrix, tensor.name))
    with pytest.raises(CheckpointError, match="no linear layers that INT8 can compute; use --precision fp32"):
        quantize_traced(model, TEXTS)
