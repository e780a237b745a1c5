"""Peak FLOP/s of cards, by the names that the driver reports."""

import math

import pytest

from megazh.errors import UsageError
from megazh.run.peaks import mfu, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835.5e12),
    ],
)
def test_known_cards(name: str, peak: float) -> None:
    assert peak_flops(name, None) == peak


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GH200 480GB",
        "NVIDIA RTX A1000",
        "NVIDIA A100X",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "GRID A100-20C",
        "Tesla V100-SXM2-32GB",
    ],
)
def test_unknown_and_look_alike_cards_have_none(name: str | None) -> None:
    assert peak_flops(name, None) is None


def test_the_users_figure_counts_more() -> None:
    assert peak_flops("NVIDIA GeForce RTX 3090", 35.5) == 35.5e12
    assert peak_flops(None, 100) == 100e12


@pytest.mark.parametrize("tflops", [0, -71, math.nan, math.inf])
def test_a_peak_that_is_none_is_refused(tflops: float) -> None:
    with pytest.raises(UsageError, match="positive number"):
        peak_flops("NVIDIA H200", tflops)


def test_mfu_is_the_share_of_the_peak() -> None:
    assert mfu(1000.0, 3e9, 12e12) == 0.25
    assert mfu(1000.0, 3e9, None) is None
