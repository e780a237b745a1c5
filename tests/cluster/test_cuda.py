"""CUDA without importing torch: the meaning of the driver's answers, and torch's version file."""

import ctypes

import pytest
import torch

from megazh.cluster.cuda import describe_torch, gpu_memory, usable_gpus


class Driver:
    """A stand-in for libcuda, with a version, a number of GPUs, and a function that fails."""

    def __init__(self, version: int = 13000, gpus: int = 6, fails: str = "") -> None:
        self._version, self._gpus, self._fails = version, gpus, fails

    def cuInit(self, flags: int) -> int:
        return self._answer("cuInit", None, 0)

    def cuDriverGetVersion(self, number: object) -> int:
        return self._answer("cuDriverGetVersion", number, self._version)

    def cuDeviceGetCount(self, number: object) -> int:
        return self._answer("cuDeviceGetCount", number, self._gpus)

    def cuDeviceGet(self, device: object, number: int) -> int:
        return self._answer("cuDeviceGet", device, number)

    def cuDeviceTotalMem_v2(self, size: object, device: ctypes.c_int) -> int:
        if self._fails == "cuDeviceTotalMem_v2":
            return 803
        ctypes.cast(size, ctypes.POINTER(ctypes.c_size_t))[0] = (device.value + 1) << 30  # type: ignore[arg-type]
        return 0

    def cuGetErrorString(self, code: int, text: object) -> int:
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = f"error number {code}".encode()  # type: ignore[arg-type]
        return 0

    def _answer(self, name: str, number: object, value: int) -> int:
        if name == self._fails:
            return 803
        if number is not None:
            ctypes.cast(number, ctypes.POINTER(ctypes.c_int))[0] = value  # type: ignore[arg-type]
        return 0


def test_version_and_cuda_are_those_of_torch() -> None:
    found = describe_torch()
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)
    assert found.gpus == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@pytest.mark.parametrize(("version", "cuda"), [(13000, "13.0"), (13000, "13.2"), (13010, "12.8"), (12020, "12.9")])
def test_a_driver_serves_its_major_version_and_older_ones(version: int, cuda: str) -> None:
    assert usable_gpus(Driver(version), cuda) == (6, "")


def test_an_older_driver_is_named_with_both_versions() -> None:
    gpus, failure = usable_gpus(Driver(12080), "13.0")
    assert gpus == 0
    assert failure == "the NVIDIA driver is too old: it supports CUDA 12.8, and this torch needs CUDA 13.0"


@pytest.mark.parametrize("name", ["cuInit", "cuDriverGetVersion", "cuDeviceGetCount"])
def test_an_error_of_the_driver_is_its_own_text(name: str) -> None:
    assert usable_gpus(Driver(fails=name), "13.0") == (0, "error number 803")


def test_memory_of_each_gpu_as_far_as_the_driver_says() -> None:
    assert gpu_memory(Driver(), 3) == (1 << 30, 2 << 30, 3 << 30)
    assert gpu_memory(Driver(fails="cuDeviceTotalMem_v2"), 3) == ()
    assert gpu_memory(Driver(), 0) == ()
