"""Machines that can run the kernels, and the reason why others cannot."""

import importlib.util
import shutil

import pytest
import torch

from megazh.kernels import support


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 8.6, and an empty cache."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    support.why_not.cache_clear()


CUDA = torch.device("cuda", 0)


def test_a_3090_with_a_compiler_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    monkeypatch.setattr(support.Path, "exists", lambda path: True)
    assert support.why_not(CUDA, torch.bfloat16) is None


def test_each_obstacle_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert support.why_not(torch.device("cpu"), torch.bfloat16) == "there is no GPU"
    assert "not in float32" in (support.why_not(CUDA, torch.float32) or "")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    support.why_not.cache_clear()
    assert "apt-get install gcc" in (support.why_not(CUDA, torch.bfloat16) or "")
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(support.Path, "exists", lambda path: False)
    support.why_not.cache_clear()
    assert "python3-dev" in (support.why_not(CUDA, torch.bfloat16) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    support.why_not.cache_clear()
    assert "below 8.0" in (support.why_not(CUDA, torch.bfloat16) or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    support.why_not.cache_clear()
    assert "Triton is not installed" in (support.why_not(CUDA, torch.bfloat16) or "")
