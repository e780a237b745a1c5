"""What a machine must have to run the kernels of this package, and the card that they run on; imports none of them."""

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

INTERPRETED_AS = (8, 6)
"""Compute capability whose launches Triton's interpreter makes on a CPU: that of an RTX 3090."""


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, such as (8, 6)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETED_AS


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why Triton kernels cannot run on this device; None if they can.

    Args:
        device: device of the tensors; kernels need CUDA with compute capability 8.0 or later.
        dtype: dtype of the tensors; kernels need bf16 or fp16.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install a CUDA build of torch, which includes it"
    if device.type != "cuda":
        return "there is no GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"kernels compute in bf16 and fp16, not in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    # Triton compiles a C launcher for each kernel.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler; install gcc (Debian, Ubuntu: apt-get install gcc)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"{header} is missing; install Python's headers (Debian, Ubuntu: apt-get install python3-dev)"
    return None
