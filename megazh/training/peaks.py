"""What a card can do at most, the measure that model FLOPs utilization (MFU) is taken against."""

import math
import re

from megazh.errors import UsageError

# Dense bf16 tensor-core peak with fp32 accumulation, in FLOP/s. A row fits a card whose name holds all its words; the
# first that fits counts. Where a data sheet names only the figure with 2:4 sparsity, half of that.
_PEAKS: tuple[tuple[str, float], ...] = (
    # NVIDIA Ampere GA102 whitepaper, V2: "Peak BF16 Tensor TFLOPS with FP32 Accumulate", RTX 3090 and 3090 Ti
    ("RTX 3090 TI", 80e12),
    ("RTX 3090", 71e12),
    # NVIDIA Ada GPU architecture whitepaper, the same line, RTX 4090
    ("RTX 4090", 165.2e12),
    # NVIDIA A100 Tensor Core GPU data sheet: BFLOAT16 Tensor Core, the same for SXM and PCIe
    ("A100", 312e12),
    # NVIDIA H100 Tensor Core GPU data sheet: 1,671 (NVL), 1,513 (PCIe) and 1,979 (SXM) TFLOPS with sparsity
    ("H100 NVL", 835.5e12),
    ("H100 PCIE", 756e12),
    ("H100 HBM3", 989e12),
    # NVIDIA H200 Tensor Core GPU data sheet: 1,671 (NVL) and 1,979 (SXM) TFLOPS with sparsity
    ("H200 NVL", 835.5e12),
    ("H200", 989e12),
)

# Slower or faster kin of the same name: laptop cards, the RTX 4090 D, parts of a card (MIG, GRID), a custom A100.
_KIN = frozenset({"LAPTOP", "MAX", "D", "MIG", "GRID", "64GB"})


def peak_flops(name: str | None, override_tflops: float | None = None) -> float | None:
    """Dense bf16 peak of one card in FLOP/s; None where it is not known, and MFU then cannot be told.

    Args:
        name: as `torch.cuda.get_device_name()` has it; None without a GPU.
        override_tflops: the peak in TFLOP/s as the user gives it, which counts more than the table.

    Raises:
        UsageError: `override_tflops` is no positive number.
    """
    if override_tflops is not None:
        if not (math.isfinite(override_tflops) and override_tflops > 0):
            raise UsageError(
                f"a peak of {override_tflops:g} TFLOP/s is none: give a positive number, such as 71 for an RTX 3090"
            )
        return override_tflops * 1e12
    words = set(re.findall(r"[A-Z0-9]+", (name or "").upper()))  # whole words: a GH200 is no H200, an A1000 no A100
    if words & _KIN:
        return None
    return next((peak for needed, peak in _PEAKS if words.issuperset(needed.split())), None)
