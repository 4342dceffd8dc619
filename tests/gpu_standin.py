"""An NVIDIA card that is not there: onnxruntime's interface, with the CPU behind it.

Runs the very graphs: that for CUDA in its emulation. Reads and writes the memory whose addresses it is given, keeps the
rules of CUDA graphs (one thread, the same buffers) and of TensorRT's profiles, and writes engine files.
"""

from __future__ import annotations

import ctypes
import re
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from m3e import backends, cuda_session, providers, tensorrt_session
from m3e.gpu import Card
from m3e.providers import CUDA, TENSORRT
from m3e_export.emulate import emulate

CARD = Card(name="Stand-in 1", compute_capability="9.0", memory_bytes=8 << 30, driver_cuda="13.0")


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class OrtValue:
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    @classmethod
    def ortvalue_from_numpy(cls, array: np.ndarray[Any, Any], device: str, device_id: int) -> OrtValue:
        assert (device, device_id) == ("cuda", 0)
        return cls(array.copy())

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: Any, dtype: Any, device: str, device_id: int) -> OrtValue:
        return cls(np.zeros(shape, dtype))

    def update_inplace(self, array: np.ndarray[Any, Any]) -> None:
        assert (array.shape, array.dtype) == (self.array.shape, self.array.dtype), "a captured run has one shape"
        self.array[...] = array

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.array.copy()


def at_address(dtype: Any, shape: Any, address: int) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).reshape(shape)


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, np.ndarray[Any, Any]] = {}
        self.output: np.ndarray[Any, Any] = np.empty(0)

    def bind_input(self, name: str, device: str, device_id: int, dtype: Any, shape: Any, address: int) -> None:
        self.inputs[name] = at_address(dtype, shape, address)

    def bind_output(self, name: str, device: str, device_id: int, dtype: Any, shape: Any, address: int) -> None:
        self.output = at_address(dtype, shape, address)

    def synchronize_inputs(self) -> None:
        pass

    def synchronize_outputs(self) -> None:
        pass

    def bind_ortvalue_input(self, name: str, value: OrtValue) -> None:
        self.inputs[name] = value.array

    def bind_ortvalue_output(self, name: str, value: OrtValue) -> None:
        self.output = value.array


class StandInSession:
    """What ``open_on_gpu`` would return."""

    refuse_capture = False

    def __init__(self, model: bytes, provider: str, options: dict[str, str]) -> None:
        proto = onnx.load_from_string(model)
        self.provider, self.options = provider, options
        self.inputs = {item.name: item.type.tensor_type.elem_type for item in proto.graph.input}
        data = emulate(proto).SerializeToString() if "token_offset" in self.inputs else model
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
        self.captured: dict[str, tuple[int, Binding]] = {}
        self.shapes: list[tuple[int, ...]] = []

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
        number = options.entries["gpu_graph_id"]
        if number != "-1":
            if self.refuse_capture or self.options["enable_cuda_graph"] != "1":
                raise RuntimeError("capture is not possible")
            here = threading.get_ident(), binding
            assert self.captured.setdefault(number, here) == here, "captured in another thread or with other buffers"
        binding.output[...] = self._session.run(None, binding.inputs)[0]

    def run(self, outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
        self.shapes.append(feeds["input_ids"].shape)
        if self.provider == TENSORRT:
            bounds = {}
            for end in ("min", "max"):
                text = self.options[f"trt_profile_{end}_shapes"]
                bounds[end] = {
                    name: tuple(map(int, dims.split("x"))) for name, dims in re.findall(r"(\w+):([\dx]+)", text)
                }
            for name, array in feeds.items():
                for low, size, high in zip(bounds["min"][name], array.shape, bounds["max"][name], strict=True):
                    assert low <= size <= high, f"{name} {array.shape} is outside of the profile: the engine is rebuilt"
            folder = Path(self.options["trt_engine_cache_path"])
            if not list(folder.glob("*.engine")):
                (folder / "graph_sm90.engine").write_bytes(b"engine for " + text.encode())
                Path(self.options["trt_timing_cache_path"], "sm90.timing").write_bytes(b"timings")
        result: list[Any] = self._session.run(outputs, feeds)
        return result


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> list[StandInSession]:
    """Put the stand-in in place; the sessions that were opened are listed."""
    opened: list[StandInSession] = []

    def open_on_gpu(model: bytes, provider: str, options: list[tuple[str, dict[str, str]]]) -> StandInSession:
        assert options[0][0] == provider
        opened.append(StandInSession(model, provider, options[0][1]))
        return opened[-1]

    module = types.SimpleNamespace(RunOptions=RunOptions, OrtValue=OrtValue)
    monkeypatch.setattr(cuda_session, "import_onnxruntime", lambda: module)
    for user in (cuda_session, tensorrt_session):
        monkeypatch.setattr(user, "open_on_gpu", open_on_gpu)
    monkeypatch.setattr(cuda_session, "cuda_runtime", lambda: None)
    monkeypatch.setattr(backends, "read_card", lambda device_id: CARD)
    monkeypatch.setattr(backends, "tensorrt_version", lambda: "10.16.1")
    return opened


__all__ = ["CARD", "CUDA", "StandInSession", "providers", "standin"]
