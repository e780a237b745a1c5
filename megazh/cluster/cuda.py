"""CUDA as torch will see it, without importing torch, which takes seconds: torch's version file and the CUDA driver."""

import ctypes
import importlib.util
import os
import runpy
from pathlib import Path
from typing import Any, NamedTuple


class Torch(NamedTuple):
    """The torch that is installed, and the GPUs that it can use."""

    version: str
    cuda: str | None
    """CUDA version that torch is built for; None: built without CUDA."""
    gpus: int
    """Number of GPUs that torch can use, among those that CUDA_VISIBLE_DEVICES shows."""
    failure: str = ""
    """Reason why it can use none; empty where there is no NVIDIA driver, or where it can."""
    memory: tuple[int, ...] = ()
    """Bytes of memory of each of these GPUs, as far as the driver says."""


def describe_torch() -> Torch:
    """Look at the installed torch and at the driver. Raises ModuleNotFoundError where torch is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    found = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    version, cuda = str(found["__version__"]), found["cuda"]
    if cuda is None:
        return Torch(version, None, 0)
    try:
        driver: Any = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Torch(version, cuda, 0)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # in the order in which the ranks will see them
    gpus, failure = usable_gpus(driver, cuda)
    return Torch(version, cuda, gpus, failure, gpu_memory(driver, gpus))


def usable_gpus(driver: Any, cuda: str) -> tuple[int, str]:
    """The number of GPUs that a torch for this CUDA version can use, and the reason where it is none.

    A driver serves every CUDA version of its own major version and older ones (CUDA Compatibility, section "Minor
    Version Compatibility").

    Args:
        driver: libcuda, whose functions return 0 on success (CUDA Driver API).
        cuda: CUDA version that torch is built for, such as `13.0`.
    """
    if code := driver.cuInit(0):
        return 0, _error_text(driver, code)
    number = ctypes.c_int()
    if code := driver.cuDriverGetVersion(ctypes.byref(number)):
        return 0, _error_text(driver, code)
    major, minor = number.value // 1000, number.value % 1000 // 10
    if major < int(cuda.partition(".")[0]):
        return 0, f"the NVIDIA driver is too old: it supports CUDA {major}.{minor}, and this torch needs CUDA {cuda}"
    if code := driver.cuDeviceGetCount(ctypes.byref(number)):
        return 0, _error_text(driver, code)
    return number.value, ""


def gpu_memory(driver: Any, gpus: int) -> tuple[int, ...]:
    """Bytes of memory of each GPU, as far as the driver says.

    Args:
        driver: libcuda, initialised.
        gpus: number of GPUs.
    """
    found = []
    for number in range(gpus):
        device, size = ctypes.c_int(), ctypes.c_size_t()
        if driver.cuDeviceGet(ctypes.byref(device), number) or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device):
            break
        found.append(size.value)
    return tuple(found)


def _error_text(driver: Any, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return text.value.decode() if text.value else f"CUDA driver error {code}"
