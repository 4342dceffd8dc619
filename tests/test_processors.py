"""INT8 on processors with and without VNNI: the loader's pick, and the canary that proves it.

Without VNNI, pairs of 8-bit products are added in 16 bits and saturate; onnxruntime then gives wrong sums silently.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from m3e import BundleError, Encoder, ExportError, PrecisionWarning, StartError, backends, cpu
from m3e.bundle import Bundle
from m3e.manifest import decode_array
from m3e.session import Session
from m3e.tokenizer import Tokenizer
from m3e_export import graphs
from m3e_export.pipeline import convert

HERE = cpu.cpu_features() or frozenset()
VNNI, AVX2 = "onnx/model_int8.onnx", "onnx/model_int8_avx2.onnx"


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both int8 graphs, with the golden vectors that a processor with VNNI computes, made on any processor."""
    target = tmp_path_factory.mktemp("processors") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "cpu_features", lambda: frozenset({"vnni"}))
        patch.setattr(graphs, "Session", _ExactSession)
        patch.setattr(backends, "Session", _ExactSession)
        convert(str(tiny_checkpoint), target, precisions=("fp32", "int8"), cpus=("vnni", "avx2"))
    return target


class _ExactSession(Session):
    """Runs what is int8 as uint8, 128 higher with a zero point of 128: the same sums, never saturated."""

    def __init__(self, model: bytes, **arguments: Any) -> None:
        super().__init__(unsigned_weights(model), **arguments)


def unsigned_weights(model: bytes) -> bytes:
    graph = onnx.load_from_string(model)
    shifted = {name for node in graph.graph.node if node.op_type == "MatMulIntegerToFloat"
               for name in (node.input[1], *node.input[5:6])}  # fmt: skip
    for tensor in graph.graph.initializer:
        if tensor.name in shifted and tensor.data_type == onnx.TensorProto.INT8:
            levels = numpy_helper.to_array(tensor).astype(np.int16) + 128
            tensor.CopyFrom(numpy_helper.from_array(levels.astype(np.uint8), tensor.name))
    data: bytes = graph.SerializeToString()
    return data


def golden_difference(bundle: Path, file: str, session: type[Session]) -> float:
    opened = Bundle(bundle)
    graph = opened.graph(file, "cpu")
    ids = Tokenizer(opened.read("tokenizer.json"), 512)([item.text for item in opened.manifest.golden]).input_ids
    actual = session(opened.read(file), num_threads=1).run(ids)
    return float(np.abs(actual - decode_array(graph.golden_embeddings, actual.shape)).max())


def test_weights_of_7_bits_give_exact_sums_on_any_processor(bundle: Path) -> None:
    assert golden_difference(bundle, AVX2, Session) == golden_difference(bundle, AVX2, _ExactSession)
    assert golden_difference(bundle, AVX2, Session) < 1e-6


@pytest.mark.skipif("vnni" in HERE, reason="this processor does not saturate: the emulated one below stands in")
def test_the_canary_refuses_saturated_sums(bundle: Path) -> None:
    with pytest.raises(StartError, match="other vectors on this machine"):
        Encoder(bundle, precision=VNNI)
    Encoder(bundle, precision=AVX2)


@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="VNNI is x86's")
def test_an_emulated_processor_without_vnni(bundle: Path, record_property: Callable[[str, str], None]) -> None:
    """In one process, because importing numpy and onnxruntime takes the emulator minutes."""
    emulator = shutil.which("qemu-x86_64")
    assert emulator is not None, "apt-get install qemu-user"
    program = (
        "import sys, m3e\n"
        "for file in sys.argv[2:]:\n"
        "    try:\n        m3e.Encoder(sys.argv[1], precision=file, num_threads=1)\n"
        "    except m3e.StartError as error:\n        print(str(error).partition(':')[0])\n"
        "    else:\n        print('fine')\n"
    )
    result = subprocess.run(
        [emulator, "-cpu", "Haswell", sys.executable, "-c", program, str(bundle), VNNI, AVX2, "fp32"],
        capture_output=True, text=True, check=True, timeout=1200,
    )  # fmt: skip
    vnni, avx2, fp32 = result.stdout.strip().splitlines()
    record_property("B7", f"on an emulated Haswell 8 bits: {vnni[:60]}; 7 bits: {avx2}; fp32: {fp32}")
    assert "other vectors" in vnni
    assert (avx2, fp32) == ("fine", "fine")


@pytest.mark.parametrize(
    ("features", "expected"),
    [(frozenset({"vnni"}), VNNI), (frozenset(), AVX2), (None, VNNI)],
    ids=["vnni", "none", "unknown"],
)
def test_the_loader_picks_what_the_processor_computes_right(
    bundle: Path, features: frozenset[str] | None, expected: str
) -> None:
    assert Bundle(bundle).graph("int8", "cpu", features).file == expected


def test_a_processor_that_can_run_no_int8_graph(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = without_graph(bundle, tmp_path / "vnni", AVX2)
    monkeypatch.setattr(backends, "cpu_features", lambda: frozenset())
    with pytest.raises(BundleError, match=r"needs a processor with vnni.*--cpu avx2"):
        Encoder(folder, precision="int8")
    with pytest.warns(PrecisionWarning, match=r"using fp32.*--cpu avx2"):
        assert Encoder(folder).precision == "fp32"


def without_graph(bundle: Path, target: Path, file: str) -> Path:
    shutil.copytree(bundle, target)
    (target / file).unlink()
    manifest = Bundle(bundle).manifest
    graphs = tuple(graph for graph in manifest.graphs if graph.file != file)
    files = {name: entry for name, entry in manifest.files.items() if name != file}
    (target / "manifest.json").write_bytes(dataclasses.replace(manifest, graphs=graphs, files=files).to_bytes())
    return target


def test_a_graph_that_this_processor_cannot_certify_is_not_made(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "cpu_features", lambda: frozenset())
    with pytest.raises(ExportError, match="lacks vnni"):
        convert(str(tiny_checkpoint), tmp_path / "out", precisions=("int8",), cpus=("avx2", "vnni"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "expected"),
    [
        ("x86_64", "processor : 0\nflags\t\t: fpu avx2 avx512_vnni\n", {"vnni"}),
        ("x86_64", "flags : fpu avx_vnni\n", {"vnni"}),
        ("AMD64", "flags : fpu avx2 my_avx512_vnni_like\n", set()),
        ("aarch64", None, {"vnni"}),
        ("arm64", None, {"vnni"}),
        ("x86_64", None, None),
        ("x86_64", "model name: something\n", None),
    ],
    ids=["avx512", "avx", "neither", "aarch64", "apple", "no cpuinfo", "no flags"],
)
def test_features(
    machine: str, cpuinfo: str | None, expected: set[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert cpu.cpu_features(tmp_path / "cpuinfo") == expected
