"""onnxruntime's execution providers for NVIDIA cards: their options, and whether they really loaded.

The names of the options are those that onnxruntime-gpu 1.31.1 accepts; the tests hold them against its library.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
from pathlib import Path
from typing import Any

from m3e.errors import DependencyError, StartError
from m3e.session import import_onnxruntime

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_LIBRARIES = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}
_EXTRAS = {CUDA: "gpu", TENSORRT: "tensorrt"}
# onnxruntime_session_options_config_keys.h; the CPU must not be among the providers then.
NO_CPU = "session.disable_cpu_ep_fallback"
_WHERE = {
    CUDA: 'install CUDA 13 and cuDNN 9 (pip install "onnxruntime-gpu[cuda,cudnn]" nvidia-cublas)',
    TENSORRT: 'install TensorRT 10 (pip install "m3e-runtime[tensorrt]") beside CUDA 13',
}
# What the wheel tensorrt-cu13-libs 10 carries, in the order in which they need each other.
_TENSORRT_LIBRARIES = ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10")


def cuda_options(device_id: int, *, cuda_graphs: bool) -> dict[str, str]:
    """Options of the CUDA provider.

    Args:
        device_id: Which card.
        cuda_graphs: Whether runs are captured: of a graph that never asks the CPU for a shape, and from one thread.
    """
    return {
        "device_id": str(device_id),
        # Batches differ in size; doubling at each new one would hold memory that is never used.
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
        # What the bundle calls FP32 is FP32, not TF32's 11 bits.
        "use_tf32": "0",
        # Statistics of layer normalisation in FP32 where values are FP16.
        "enable_skip_layer_norm_strict_mode": "1",
        "enable_cuda_graph": str(int(cuda_graphs)),
    }


def tensorrt_options(device_id: int, folder: Path, timing: Path, profile: dict[str, str]) -> dict[str, str]:
    """Options of the TensorRT provider.

    Args:
        device_id: Which card.
        folder: Where the engine is kept.
        timing: Where the timings of kernels are kept, which later engines build faster with.
        profile: Shapes of the inputs: ``min``, ``opt`` and ``max``.
    """
    return {
        "device_id": str(device_id),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(timing),
        **{f"trt_profile_{end}_shapes": shapes for end, shapes in profile.items()},
        # Neither flag: the network is then strongly typed, and every precision is the graph's.
        "trt_fp16_enable": "0",
        "trt_int8_enable": "0",
        "trt_builder_optimization_level": "3",
    }


def open_on_gpu(model: bytes, provider: str, options: dict[str, str], *, whole: bool = False) -> Any:
    """Open a graph and make sure that the provider took it.

    Args:
        model: The ONNX file's bytes.
        provider: The provider that must load.
        options: Its options.
        whole: Refuse a graph of which the provider leaves an operator to the CPU.

    Returns:
        An ``onnxruntime.InferenceSession`` that never falls back.

    Raises:
        DependencyError: This onnxruntime was built without the provider.
        StartError: The provider did not load, or refuses the graph; the message names what is missing.
    """
    onnxruntime = import_onnxruntime()
    if not has_provider(provider):
        raise DependencyError(
            f"this onnxruntime {onnxruntime.__version__} has no {provider}; in place of onnxruntime install "
            f'pip install "m3e-runtime[{_EXTRAS[provider]}]" (the two cannot be installed together)'
        )
    preload(provider)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1  # the few operators on shapes need no more
    settings.log_severity_level = 4  # what fails is raised below, with its reason
    if whole:
        settings.add_session_config_entry(NO_CPU, "1")
    try:
        # Without its own fall-back, which would open the graph on the CPU and print.
        session = onnxruntime.InferenceSession(model, settings, providers=[(provider, options)], enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class
        if (missing := missing_library(provider)) is not None:
            raise StartError(f"{provider} cannot be loaded: {missing}") from error
        raise StartError(f"onnxruntime {onnxruntime.__version__} cannot open the graph: {error}") from error
    if session.get_providers()[0] != provider:
        if (missing := missing_library(provider)) is not None:
            raise StartError(f"{provider} cannot be loaded: {missing}")
        raise StartError(
            f"{provider} did not start, though its libraries are all there; look whether nvidia-smi sees the card and "
            "the driver is new enough"
        )
    session._model_bytes = None  # kept for the fall-back alone, and the weights are on the card now
    return session


def missing_library(provider: str) -> str | None:
    """Say which library the system's loader misses for a provider, and where it can be had; None if none.

    To be asked only after onnxruntime has tried: it must be the first to load its own library, which takes its host
    from it in that moment.
    """
    folder = Path(import_onnxruntime().__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / _LIBRARIES[provider]))
    except OSError as error:
        return f"{error}; {_WHERE[provider]}, or choose another device"
    return None


def preload(provider: str) -> None:
    """Load NVIDIA's libraries from the wheels that carry them, where they are; elsewhere the loader finds its own."""
    onnxruntime = import_onnxruntime()
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find, as `missing_library` says
            onnxruntime.preload_dlls()
    spec = importlib.util.find_spec("tensorrt_libs") if provider == TENSORRT else None
    if spec is not None and spec.submodule_search_locations:
        for name in _TENSORRT_LIBRARIES:
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(Path(spec.submodule_search_locations[0]) / name), mode=ctypes.RTLD_GLOBAL)


def cuda_runtime(device_id: int) -> Any | None:
    """Give libcudart, as the CUDA provider loads it, and set this thread to a card; None if there is no such library.

    A thread that was not set is on card 0, whose memory the first call would take a share of.
    """
    version = getattr(import_onnxruntime(), "cuda_version", "") or ""
    with contextlib.suppress(OSError):
        cudart = ctypes.CDLL(f"libcudart.so.{version.partition('.')[0]}")
        cudart.cudaSetDevice(device_id)
        return cudart
    return None


def tensorrt_version() -> str:
    """Version of the TensorRT that is loaded, such as ``10.16.1``.

    Raises:
        StartError: It cannot be loaded.
    """
    preload(TENSORRT)
    try:
        number = int(ctypes.CDLL(_TENSORRT_LIBRARIES[0]).getInferLibVersion())
    except OSError as error:
        raise StartError(f"TensorRT cannot be loaded: {error}; {_WHERE[TENSORRT]}") from error
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def has_provider(provider: str) -> bool:
    """Whether this onnxruntime was built with a provider; it may still fail to load."""
    return provider in import_onnxruntime().get_available_providers()
