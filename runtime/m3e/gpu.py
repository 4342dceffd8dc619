"""What the graphics card is, asked of the driver; and host memory that it can copy from without a detour.

The driver's own library is asked (CUDA Driver API, cuda.h), because it is there wherever a GPU is and obeys
CUDA_VISIBLE_DEVICES like everything else that uses the card.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from m3e.errors import StartError

_DRIVER = "libcuda.so.1"
# cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR, _MINOR = 75, 76
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A graphics card.

    Attributes:
        name: As the driver calls it.
        compute_capability: Major and minor, such as ``9.0``.
        memory_bytes: All of its memory.
        driver_cuda: The newest CUDA that the driver serves, such as ``13.0``.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    driver_cuda: str


def read_card(device_id: int = 0) -> Card:
    """Ask the driver about a card.

    Raises:
        StartError: There is no driver, or no such card.
    """
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise StartError(f"there is no NVIDIA driver here ({error}); use device='cpu'") from error

    def call(name: str, *arguments: Any) -> None:
        code = getattr(driver, name)(*arguments)
        if code != 0:
            raise StartError(f"the NVIDIA driver refused {name} for device {device_id} with error {code} (cuda.h)")

    count, device, number = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    call("cuInit", 0)
    call("cuDeviceGetCount", ctypes.byref(count))
    if not 0 <= device_id < count.value:
        raise StartError(f"device_id is {device_id}, and {count.value} NVIDIA cards are visible")
    call("cuDeviceGet", ctypes.byref(device), device_id)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    call("cuDeviceGetName", name, len(name), device)
    call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        capability.append(str(number.value))
    call("cuDriverGetVersion", ctypes.byref(number))
    return Card(
        name=name.value.decode(),
        compute_capability=".".join(capability),
        memory_bytes=memory.value,
        driver_cuda=f"{number.value // 1000}.{number.value % 1000 // 10}",
    )


def size_of(arrays: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]) -> int:
    """What arrays of these shapes and types take of a buffer, each from an aligned address: bytes."""
    return sum(-(-int(np.prod(shape)) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape, dtype in arrays)


class PinnedBuffer:
    """Host memory of a fixed size, page-locked if the CUDA runtime is given: copies to the card then need no detour.

    Args:
        size_bytes: Capacity.
        cudart: The CUDA runtime (libcudart) as a ctypes library, or None for plain memory.
    """

    def __init__(self, size_bytes: int, cudart: Any | None) -> None:
        self.size_bytes = size_bytes
        # Pages of its own: locking works by the page. And shared ones, so that a fork of this process, by whomever,
        # leaves them where the card copies from; private pages would move at the next write.
        self._memory = np.frombuffer(mmap.mmap(-1, size_bytes), dtype=np.uint8)
        self._cudart = cudart
        self._address = ctypes.c_void_p(self._memory.ctypes.data)
        if cudart is not None and (code := cudart.cudaHostRegister(self._address, ctypes.c_size_t(size_bytes), 0)):
            raise StartError(f"the CUDA runtime cannot lock {size_bytes} bytes of host memory: error {code}")

    def views(self, arrays: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]) -> list[npt.NDArray[Any]]:
        """Lay arrays of these shapes and types out in the buffer; they are valid until the next call."""
        views, start = [], 0
        for shape, dtype in arrays:
            size = int(np.prod(shape)) * dtype.itemsize
            views.append(self._memory[start : start + size].view(dtype).reshape(shape))
            start += size_of([(shape, dtype)])
        return views

    def __del__(self) -> None:
        cudart: Any = getattr(self, "_cudart", None)
        if cudart is not None:
            cudart.cudaHostUnregister(self._address)
