"""Choice of the backend by model, device and dtype; modules that `megazh plan` imports do not import torch."""

import subprocess
import sys

import pytest
import torch
from decoders import small

from megazh.errors import UsageError
from megazh.kernels import support
from megazh.model.backend import Backend, choose_backend

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "backend"),
    [
        (torch.device("cpu"), torch.bfloat16, (8, 6), Backend.MASKED),
        (torch.device("cpu"), torch.float32, (8, 6), Backend.MASKED),
        (CUDA, torch.float32, (8, 6), Backend.MASKED),
        (CUDA, torch.bfloat16, (7, 5), Backend.MASKED),
        (CUDA, torch.float16, (7, 0), Backend.MASKED),
        (CUDA, torch.bfloat16, (8, 0), Backend.VARLEN),
        (CUDA, torch.float16, (8, 6), Backend.VARLEN),
        (CUDA, torch.bfloat16, (12, 0), Backend.VARLEN),
    ],
)
def test_backend(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    dtype: torch.dtype,
    capability: tuple[int, int],
    backend: Backend,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(support, "why_not", lambda device, dtype: "no compiler")
    assert choose_backend(small(), device, dtype) is backend
    with_dropout = small(attention_dropout=0.1)
    if backend is Backend.MASKED:
        assert choose_backend(with_dropout, device, dtype) is backend
        return
    with pytest.raises(UsageError, match=r"attention_dropout 0\.1: .* has no dropout; set model\.attention_dropout=0"):
        choose_backend(with_dropout, device, dtype)


def test_kernels_serve_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(support, "why_not", lambda device, dtype: None)
    assert choose_backend(small(), CUDA, torch.bfloat16) is Backend.FUSED
    assert choose_backend(small(), CUDA, torch.bfloat16, kernels=False) is Backend.VARLEN
    assert choose_backend(small(), torch.device("cpu"), torch.bfloat16) is Backend.MASKED
    for unfit in (
        {"norm": "layernorm"}, {"mlp": "gelu"}, {"parallel_residual": True}, {"residual_dropout": 0.1},
        {"hidden_size": 520, "num_attention_heads": 4, "num_key_value_heads": 4},
    ):  # fmt: skip
        assert choose_backend(small(**unfit), CUDA, torch.bfloat16) is Backend.VARLEN


@pytest.mark.parametrize("name", ["backend", "config", "counts"])
def test_the_planner_can_import_it_without_torch(name: str) -> None:
    code = f"import sys, megazh.model.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
