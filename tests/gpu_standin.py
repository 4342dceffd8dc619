"""An NVIDIA card that is not there: onnxruntime's interface, with the CPU behind it.

Runs the very graphs, that for CUDA in its emulation, with onnxruntime's own IOBinding, OrtValue and RunOptions. Keeps
the rules of CUDA graphs (one thread, the same buffers) and of TensorRT's profiles, and writes engine files.
"""

from __future__ import annotations

import re
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from m3e import backends, cuda_graphs, cuda_session, providers, tensorrt_session
from m3e.gpu import Card
from m3e.providers import CUDA, TENSORRT
from m3e_export.emulate import emulate

CARD = Card(name="Stand-in 1", compute_capability="9.0", memory_bytes=8 << 30, driver_cuda="13.0")


class OrtValue(onnxruntime.OrtValue):  # type: ignore[misc]
    """What would be on the card; it is copied to be read."""

    @classmethod
    def ortvalue_from_numpy(cls, array: np.ndarray[Any, Any], device: str, device_id: int) -> Any:
        assert (device, device_id) == ("cuda", 0)
        return super().ortvalue_from_numpy(array.copy(), "cpu", 0)

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: Any, dtype: Any, device: str, device_id: int) -> Any:
        assert (device, device_id) == ("cuda", 0)
        return super().ortvalue_from_shape_and_type(shape, dtype, "cpu", 0)

    def numpy(self) -> Any:
        return super().numpy().copy()


class Binding(onnxruntime.IOBinding):  # type: ignore[misc]
    """Onnxruntime's own; remembers what is bound where."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def bind_input(self, name: str, device: str, device_id: int, dtype: Any, shape: Any, address: int) -> None:
        self.shapes[name] = tuple(shape)
        super().bind_input(name, device, device_id, dtype, shape, address)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.shapes[name], self.addresses[name] = tuple(value.shape()), value.data_ptr()
        super().bind_ortvalue_input(name, value)


class StandInSession:
    """What ``open_on_gpu`` would return."""

    refuse_capture = False
    builds = True

    def __init__(self, model: bytes, provider: str, options: dict[str, str]) -> None:
        proto = onnx.load_from_string(model)
        self.provider, self.options = provider, options
        self.inputs = {item.name: item.type.tensor_type.elem_type for item in proto.graph.input}
        data = emulate(proto).SerializeToString() if "token_offset" in self.inputs else model
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
        self.captured: dict[str, tuple[Binding, dict[str, int]]] = {}
        self.threads: set[int] = set()
        if provider == TENSORRT:  # builds when it opens, for its profile
            folder = Path(options["trt_engine_cache_path"])
            if self.builds and not list(folder.glob("*.engine")):
                (folder / "graph_sm90.engine").write_bytes(b"engine for " + options["trt_profile_max_shapes"].encode())
                Path(options["trt_timing_cache_path"], "sm90.timing").write_bytes(b"timings")

    def io_binding(self) -> Binding:
        return Binding(self._session)

    def run_with_iobinding(self, binding: Binding, options: Any = None) -> None:
        self.threads.add(threading.get_ident())
        if self.provider == TENSORRT:
            self._check_profile(binding.shapes)
        elif self.options["enable_cuda_graph"] == "1":
            assert len(self.threads) == 1, "a session with CUDA graphs runs from one thread"
            if self.refuse_capture:
                raise RuntimeError("capture is not possible")
            here = binding, dict(binding.addresses)
            number = options.get_run_config_entry("gpu_graph_id")
            assert self.captured.setdefault(number, here) == here, "captured with other buffers"
        self._session.run_with_iobinding(binding, options)

    def _check_profile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        bounds = {}
        for end in ("min", "max"):
            text = self.options[f"trt_profile_{end}_shapes"]
            bounds[end] = {name: tuple(map(int, dims.split("x"))) for name, dims in re.findall(r"(\w+):([\dx]+)", text)}
        assert shapes.keys() == bounds["min"].keys(), "every input needs a profile, or none counts"
        for name, shape in shapes.items():
            for low, size, high in zip(bounds["min"][name], shape, bounds["max"][name], strict=True):
                assert low <= size <= high, f"{name} {shape} is outside of the profile: the engine is rebuilt"


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> list[StandInSession]:
    """Put the stand-in in place; the sessions that were opened are listed."""
    opened: list[StandInSession] = []

    def open_on_gpu(model: bytes, provider: str, options: dict[str, str], *, whole: bool = False) -> StandInSession:
        assert whole == (provider == TENSORRT)
        opened.append(StandInSession(model, provider, options))
        return opened[-1]

    module = types.SimpleNamespace(RunOptions=onnxruntime.RunOptions, OrtValue=OrtValue)
    monkeypatch.setattr(cuda_graphs, "import_onnxruntime", lambda: module)
    for user in (cuda_graphs, cuda_session, tensorrt_session):
        monkeypatch.setattr(user, "open_on_gpu", open_on_gpu)
    monkeypatch.setattr(cuda_session, "cuda_runtime", lambda device_id: None)
    monkeypatch.setattr(backends, "read_card", lambda device_id: CARD)
    monkeypatch.setattr(backends, "tensorrt_version", lambda: "10.16.1")
    return opened


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> list[StandInSession]:
    """The stand-in, for a test."""
    return put_in_place(monkeypatch)


__all__ = ["CARD", "CUDA", "StandInSession", "providers", "put_in_place", "standin"]
