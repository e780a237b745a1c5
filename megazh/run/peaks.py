"""Model FLOPs utilization (MFU), and the peak throughput of each card that it is measured against."""

import math
import re

from megazh.errors import UsageError

# Dense bf16 tensor-core peak with fp32 accumulation, in FLOP/s. A row matches a card whose name holds all its words;
# the first match counts. Where a data sheet gives only the figure with 2:4 sparsity, the value is half of it.
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

# Slower or faster variants of the same name: laptop cards, the RTX 4090 D, slices of a card (MIG, GRID), a custom A100.
_VARIANTS = frozenset({"LAPTOP", "MAX", "D", "MIG", "GRID", "64GB"})


def peak_flops(name: str | None, override_tflops: float | None = None) -> float | None:
    """Dense bf16 peak of one card in FLOP/s; None where it is not known, so that no MFU can be computed.

    Args:
        name: name of the card as `torch.cuda.get_device_name()` returns it; None without a GPU.
        override_tflops: peak in TFLOP/s given by the user, in place of the table's.

    Raises:
        UsageError: `override_tflops` is not a positive number.
    """
    if override_tflops is not None:
        if not (math.isfinite(override_tflops) and override_tflops > 0):
            raise UsageError(f"peak_tflops={override_tflops:g}: expected a positive number, such as 71 for an RTX 3090")
        return override_tflops * 1e12
    words = set(re.findall(r"[A-Z0-9]+", (name or "").upper()))  # whole words: a GH200 is no H200, an A1000 no A100
    if words & _VARIANTS:
        return None
    return next((peak for needed, peak in _PEAKS if words.issuperset(needed.split())), None)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilization of one card, as a share of `peak` (PaLM, arXiv 2204.02311, appendix B).

    Args:
        tokens_per_second: tokens per second that the card trains; of a whole run, divided by its cards.
        flops_per_token: FLOPs that forward and backward need per token (`megazh.model.counts`), recomputation excluded.
        peak: peak of the card in FLOP/s; None where it is not known, and then so is the result.
    """
    return tokens_per_second * flops_per_token / peak if peak else None
