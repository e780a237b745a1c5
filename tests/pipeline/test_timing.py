"""Measured layer costs: positive, cached, and measured again if the cached file is damaged or for another shape."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decoders import small

from megazh.model.backend import Backend
from megazh.model.lora_config import LoraConfig
from megazh.pipeline import timing
from megazh.pipeline.costs import LayerCosts
from megazh.pipeline.precision import Dtype, Precision
from megazh.pipeline.work import Work

SMALL = small(residual_dropout=0.1)


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LayerCosts]:
    """`layer_seconds` with a cache of its own."""
    monkeypatch.setenv("MEGAZH_CACHE", str(tmp_path))

    def measured(
        seq_len: int = 16, dtype: Dtype = Dtype.FP32, checkpointing: bool = False, lora: LoraConfig | None = None
    ) -> LayerCosts:
        precision = Precision(dtype, Dtype.FP32, Dtype.FP32)
        work = Work(SMALL, 1, 1, seq_len, 2, 1, precision, checkpointing, Backend.MASKED, lora=lora)
        return timing.layer_seconds(work, torch.device("cpu"))

    return measured


def cached_files(cache: Path) -> list[Path]:
    """Files in the cache."""
    return sorted((cache / "timings").iterdir())


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])
def test_every_type_of_part_takes_time(measure: Callable[..., LayerCosts], dtype: Dtype) -> None:
    costs = measure(dtype=dtype)
    assert costs.unit == "seconds"
    assert 0 < costs.embedding < 1
    assert 0 < costs.block < 1
    assert 0 < costs.head < 1
    assert costs.block > costs.embedding, "a look-up is cheaper"


def test_it_is_measured_once(
    measure: Callable[..., LayerCosts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure()
    with monkeypatch.context() as patch:
        patch.setattr(timing, "_measure", None)
        assert measure() == first
    pairs = LoraConfig(rank=2, dropout=0.1)
    for changes in ({"seq_len": 24}, {"dtype": Dtype.BF16}, {"checkpointing": True}, {"lora": pairs}):
        measure(**changes)
    assert len(cached_files(tmp_path)) == 5, "one file per shape"


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", "null", '{"costs": {"unit": "seconds"}}', '{"costs": {"unit": "hours"}}', "\ufffd"]
)
def test_a_damaged_note_is_measured_again(measure: Callable[..., LayerCosts], tmp_path: Path, damaged: str) -> None:
    measure()
    (note,) = cached_files(tmp_path)
    note.write_text(damaged)
    again = measure()
    assert json.loads(note.read_text())["costs"] == again.model_dump(), "the new costs are cached"


def test_without_a_cache_it_measures(measure: Callable[..., LayerCosts], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAZH_CACHE", "/proc/nowhere")
    assert measure().block > 0
