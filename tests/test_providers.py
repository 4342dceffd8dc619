"""Providers of onnxruntime: their options, and what is said where one cannot be used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import onnx
import pytest

from benchmarks.server_process import COMMAND
from m3e import (
    DependencyError,
    Encoder,
    InputError,
    StartError,
    backends,
    cuda_graphs,
    gpu,
    providers,
    running,
)
from m3e.providers import CUDA, NO_CPU, TENSORRT, cuda_options, open_on_gpu, tensorrt_options
from tests.gpu_standin import StandInSession, standin

__all__ = ["standin"]

ACCEPTED = json.loads((Path(__file__).parent / "data" / "provider_options.json").read_text(encoding="utf-8"))
PROFILE = {"min": "input_ids:1x1,lengths:1", "opt": "input_ids:4x32,lengths:4", "max": "input_ids:4x32,lengths:4"}


def test_onnxruntime_accepts_every_option() -> None:
    for name, options in [
        (CUDA, cuda_options(1, cuda_graphs=True)),
        (TENSORRT, tensorrt_options(0, Path("/e"), Path("/t"), PROFILE)),
    ]:
        assert set(options) <= set(ACCEPTED[name])
        assert all(isinstance(value, str) for value in options.values())
    assert cuda_options(1, cuda_graphs=True) | {"enable_cuda_graph": "0"} == cuda_options(1, cuda_graphs=False)
    assert cuda_options(1, cuda_graphs=False)["use_tf32"] == "0"


def test_tensorrt_takes_the_precision_of_the_graph() -> None:
    options = tensorrt_options(0, Path("/e"), Path("/t"), PROFILE)
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == ("0", "0")  # strongly typed only without both
    assert options["trt_profile_max_shapes"] == "input_ids:4x32,lengths:4"


@pytest.mark.long
def test_the_list_of_options_is_the_wheels(tmp_path: Path) -> None:
    """Read the names in the wheel itself: what the committed list says, the libraries hold."""
    import zipfile

    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    subprocess.run([*pip, "onnxruntime-gpu==1.31.1"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for provider, library in ((CUDA, "cuda"), (TENSORRT, "tensorrt")):
            content = archive.read(f"onnxruntime/capi/libonnxruntime_providers_{library}.so")
            for name in ACCEPTED[provider]:
                assert f"{name}\0".encode() in content, name
        content = archive.read("onnxruntime/capi/libonnxruntime.so.1.31.1")
        for key in ("gpu_graph_id", NO_CPU):
            assert f"{key}\0".encode() in content, key


def test_a_graph_that_must_be_taken_whole_leaves_nothing_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is onnxruntime's own: with the CPU as the provider it finds itself contradicted."""
    monkeypatch.setattr(providers, "has_provider", lambda provider: True)
    monkeypatch.setattr(providers, "missing_library", lambda provider: None)
    with pytest.raises(StartError, match="explicitly added the CPU EP to the session, but also disabled fallback"):
        open_on_gpu(one_node(), "CPUExecutionProvider", {}, whole=True)
    assert open_on_gpu(one_node(), "CPUExecutionProvider", {})._model_bytes is None


def one_node() -> bytes:
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", values[:1], values[1:])
    opset = [onnx.helper.make_opsetid("", 20)]
    model: onnx.ModelProto = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def test_an_onnxruntime_without_the_provider_says_what_to_install() -> None:
    with pytest.raises(DependencyError, match=r"no CUDAExecutionProvider.*m3e-runtime\[gpu\].*cannot be installed"):
        open_on_gpu(b"", CUDA, {})


def fake_onnxruntime(folder: Path, active: list[str], error: Exception | None = None) -> Any:
    def session(model: bytes, options: Any, **given: Any) -> Any:
        if error is not None:
            raise error
        assert given["enable_fallback"] == 0
        return types.SimpleNamespace(get_providers=lambda: active)

    return types.SimpleNamespace(
        __file__=str(folder / "__init__.py"),
        __version__="1.31.1",
        get_available_providers=lambda: [TENSORRT, CUDA, "CPUExecutionProvider"],
        SessionOptions=types.SimpleNamespace,
        GraphOptimizationLevel=types.SimpleNamespace(ORT_ENABLE_BASIC=1),
        InferenceSession=session,
    )


def library(path: Path, needs: str = "") -> None:
    """Make a shared library, which needs another that is not there."""
    path.parent.mkdir(exist_ok=True)
    source = path.with_suffix(".c")
    source.write_text("int here(void) { return 0; }")
    absent = path.parent / needs
    if needs:
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{needs}", "-o", str(absent), str(source)], check=True)
    extra = ["-Wl,--no-as-needed", str(absent)] if needs else []
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(source), *extra], check=True)
    if needs:
        absent.unlink()


@pytest.mark.parametrize(("provider", "name", "needs"), [
    (CUDA, "cuda", "libcublasLt.so.13"), (TENSORRT, "tensorrt", "libnvinfer.so.10"),
])  # fmt: skip
def test_a_provider_that_misses_a_library_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str, name: str, needs: str
) -> None:
    library(tmp_path / "capi" / "libonnxruntime_providers_shared.so")
    library(tmp_path / "capi" / f"libonnxruntime_providers_{name}.so", needs)
    # onnxruntime goes on without the provider, or finds no kernel for the graph then.
    for error in (None, RuntimeError("Kernel not found")):
        fake = fake_onnxruntime(tmp_path, ["CPUExecutionProvider"], error)
        monkeypatch.setattr(providers, "import_onnxruntime", lambda fake=fake: fake)
        with pytest.raises(StartError, match=f"{provider} cannot be loaded: {needs}.*; install .*another device"):
            open_on_gpu(b"", provider, {})


def test_a_provider_that_did_not_start_or_refuses_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "missing_library", lambda provider: None)
    for fake, message in [
        (fake_onnxruntime(tmp_path, ["CPUExecutionProvider"]), "did not start.*nvidia-smi"),
        (fake_onnxruntime(tmp_path, [], RuntimeError("bad node")), "cannot open the graph: bad node"),
    ]:
        monkeypatch.setattr(providers, "import_onnxruntime", lambda fake=fake: fake)
        with pytest.raises(StartError, match=message):
            open_on_gpu(b"", CUDA, {})


def test_auto_takes_cuda_where_it_starts_and_says_so_where_it_does_not(
    gpu_bundle: Path, standin: list[StandInSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Encoder(gpu_bundle, device="auto").device == "cpu"  # this onnxruntime has no other
    monkeypatch.setattr(running, "has_provider", lambda provider: provider == CUDA)
    assert Encoder(gpu_bundle, device="auto").device == "cuda"

    def fail(device_id: int) -> None:
        raise StartError("there is no NVIDIA driver here")

    # A card for which this onnxruntime has no kernels opens, and fails at the golden texts.
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graphs, "BUCKETS", ())
        patch.setattr(StandInSession, "run_with_iobinding", lambda *_: 1 / 0)
        with pytest.warns(RuntimeWarning, match=r"takes the CPU, not CUDA: .*no vectors for the golden texts"):
            assert Encoder(gpu_bundle, device="auto").device == "cpu"
        with pytest.raises(StartError, match=r"onnx/model_fp16\.onnx gives no vectors for the golden texts.*division"):
            Encoder(gpu_bundle, device="cuda")

    monkeypatch.setattr(backends, "read_card", fail)
    with pytest.warns(RuntimeWarning, match="takes the CPU, not CUDA: there is no NVIDIA driver here"):
        encoder = Encoder(gpu_bundle, device="auto")
    assert (encoder.device, encoder.precision) == ("cpu", "fp32")
    with pytest.raises(StartError, match="no NVIDIA driver"):
        Encoder(gpu_bundle, device="cuda")
    with pytest.raises(InputError, match="device is 'tpu', expected one of 'cpu', 'cuda', 'tensorrt', 'auto'"):
        Encoder(gpu_bundle, device="tpu")


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_DRIVER", "libcuda-that-is-not-there.so.1")
    with pytest.raises(StartError, match=r"no NVIDIA driver here.*device='cpu'"):
        gpu.read_card()


DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int size, int device) { __builtin_strcpy(name, "Stand-in 9000"); return 0; }
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = 80ul << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
"""


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    command = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "driver.so"), str(tmp_path / "driver.c")]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setattr(gpu, "_DRIVER", str(tmp_path / "driver.so"))
    card = gpu.read_card()
    assert (card.name, card.compute_capability, card.driver_cuda) == ("Stand-in 9000", "9.0", "13.2")
    assert card.memory_bytes == 80 << 30
    with pytest.raises(StartError, match="device_id is 1, and 1 NVIDIA cards are visible"):
        gpu.read_card(1)


def test_a_service_whose_card_cannot_be_used_says_so_and_ends(gpu_bundle: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(gpu_bundle), "--device", "cuda", "--port", "0"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search("error: .*(NVIDIA|onnxruntime-gpu)", done.stderr)
    assert "Traceback" not in done.stderr
