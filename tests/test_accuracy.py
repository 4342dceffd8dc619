"""What a trained model loses in INT8, with weights of 8 bits and of 7, and in FP16 (emulated: no GPU is needed)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from m3e.cpu import cpu_features
from m3e.manifest import Certificate
from m3e_export.pipeline import convert
from tests.datasets import stsb_pairs

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif("vnni" not in (cpu_features() or ()), reason="the graph for VNNI is certified where it runs"),
]

Report = Callable[[str, str], None]


@pytest.fixture(scope="module")
def certificates(
    minilm_checkpoint: Path, data_dir: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Certificate]:
    """Of each graph by its file's name; measured on natural texts of 2 to 512 tokens, and on STS-B where it is."""
    folder = tmp_path_factory.mktemp("accuracy")
    pairs = None
    if data_dir is not None:
        pairs = folder / "pairs.tsv"
        pairs.write_text("".join(f"{a}\t{b}\t{score}\n" for a, b, score in stsb_pairs(data_dir)), encoding="utf-8")
    manifest = convert(
        str(minilm_checkpoint), folder / "bundle", precisions=("fp32", "int8", "fp16"), targets=("cpu", "cuda"),
        cpus=("vnni", "avx2"), evaluation=pairs,
    )  # fmt: skip
    found = {Path(graph.file).stem: graph.certificate for graph in manifest.graphs}
    return {name: certificate for name, certificate in found.items() if certificate is not None}


@pytest.mark.parametrize(
    ("graph", "least", "least_mean"),
    [("model_int8", 0.98, 0.997), ("model_int8_avx2", 0.98, 0.997), ("model_fp16", 0.9999, 0.9999)],
)
def test_a_trained_model_loses_little(
    certificates: dict[str, Certificate], graph: str, least: float, least_mean: float, record_property: Report
) -> None:
    found = certificates[graph]
    record_property("B6", f"{graph} {found.min_cosine:.5f}, mean {found.mean_cosine:.5f} over {found.n_texts} texts")
    assert found.min_cosine >= least
    assert found.mean_cosine >= least_mean


def test_weights_of_seven_bits_rank_as_those_of_eight(
    certificates: dict[str, Certificate], data_dir: Path | None, record_property: Report
) -> None:
    if data_dir is None:
        pytest.skip("labelled pairs are read where M3E_DATA_DIR says")
    eight, seven = (certificates[name].evaluation for name in ("model_int8", "model_int8_avx2"))
    assert eight is not None
    assert seven is not None
    points = 100 * abs(eight.spearman - seven.spearman)
    record_property("B7", f"{points:.2f} points of Spearman's correlation on {eight.n_pairs:,} pairs")
    assert points <= 0.3
