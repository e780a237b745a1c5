"""Whether a recipe fits its devices: memory with one stage, several, and a cut by hand; all errors at once."""

from pathlib import Path
from typing import Any

import pytest
from cases import make_case, on_cpu, on_gpus

from megazh.errors import MegazhError, UsageError
from megazh.training.checks import fit
from megazh.training.job import Devices, Request
from megazh.training.preflight import FIT, warnings_of

WIDE = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
"""A model that needs some hundred MiB."""


def fits(tmp_path: Path, devices: Devices, *settings: str, stages: int = 1, **changes: Any) -> list[str]:
    """The warnings of the memory check."""
    request = Request(stages=stages)
    case = make_case(tmp_path, None, list(settings), model=WIDE, devices=devices, request=request, **changes)
    return warnings_of(case, [fit.memory])


def test_one_stage_is_compared_with_the_card(tmp_path: Path) -> None:
    assert fits(tmp_path, on_gpus(gib=24)) == []
    with pytest.raises(UsageError) as refusal:
        fits(tmp_path, on_gpus(gib=1.7))
    line = str(refusal.value)
    assert line.startswith("the model in one stage needs 0.")
    assert "GiB a GPU, and there are 0.2 (the card's 1.7 less 1.5 for CUDA and NCCL); take a smaller micro_b" in line


@pytest.mark.parametrize("devices", [on_gpus(2, 24), on_cpu(2), on_gpus(2)], ids=["gpu", "cpu", "unknown card"])
def test_a_limit_of_the_recipe_counts_everywhere(tmp_path: Path, devices: Devices) -> None:
    assert fits(tmp_path, devices, "memory_limit_gib=1.0") == []
    with pytest.raises(UsageError, match=r"one stage needs .*there are 0\.1 .*memory_limit_gib is set on the command"):
        fits(tmp_path, devices, "memory_limit_gib=0.1")
    with pytest.raises(UsageError, match=r"^no cut into 2 stages fits 0\.1 GiB .*the limit is memory_limit_gib=0\.1"):
        fits(tmp_path, devices, "memory_limit_gib=0.1", stages=2)
    with pytest.raises(UsageError, match=r"^stage 0 of the cut \[0, 7, 8\] needs .*memory_limit_gib=0\.25"):
        fits(tmp_path, devices, "memory_limit_gib=0.25", "stage_bounds=[0,7,8]", stages=2)


def test_a_limit_above_the_card_does_not_make_it_larger(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"less 1\.5 for CUDA"):
        fits(tmp_path, on_gpus(gib=1.6), "memory_limit_gib=80")


def test_a_card_that_is_not_known_is_compared_with_a_3090(tmp_path: Path) -> None:
    assert fits(tmp_path, on_gpus()) == []
    (line,) = fits(tmp_path, on_gpus(), "micro_batch_size=8", "global_batch_size=8", "seq_len=262144")
    assert line.startswith("warning: the model in one stage needs ")
    assert line.endswith("the memory of the run's GPUs is not known here: this is an RTX 3090's")


def test_all_errors_come_at_once_each_with_its_place(tmp_path: Path) -> None:
    settings = ["warmup=50", "global_batch_size=7", "zero_stage=2"]
    case = make_case(tmp_path, None, settings, request=Request(stages=1))
    with pytest.raises(MegazhError) as refusal:
        warnings_of(case, FIT)
    lines = str(refusal.value).split("\nerror: ")
    starts = ["schedule.warmup=50: longer than the run", "global_batch_size 7 does not divide", "zero_stage=2: "]
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)
        assert "on the command line" in line
    assert f"micro_batch_size is set in {tmp_path / 'mini.yaml'}:" in lines[1]


def test_a_batch_or_length_behind_the_end_of_the_run_is_warned_of(tmp_path: Path) -> None:
    """Ten steps of 8 samples of 32 tokens, 16 in the last: what begins with 2,560 tokens would begin with step 11."""
    settings = ["steps=10", "schedule.batch={0: 8, 2304: 16, 900M: 32}", "schedule.length={0: 16, 2304: 24, 2560: 32}"]
    assert warnings_of(make_case(tmp_path, None, settings), [fit.length]) == [
        "warning: schedule.batch: 32 from 900,000,000 tokens on never begins: the run ends at 2,816 tokens",
        "warning: schedule.length: 32 from 2,560 tokens on never begins: the run ends at 2,816 tokens",
    ]


def test_samples_that_are_longer_than_the_context_are_warned_of_where_they_were_asked_for(tmp_path: Path) -> None:
    def warnings(*settings: str) -> list[str]:
        return warnings_of(make_case(tmp_path, None, list(settings), devices=on_cpu()), [fit.length])

    assert warnings() == []
    (line,) = warnings("seq_len=16", "sample_tokens=16")
    assert line.startswith("warning: sample_tokens=16: with its prompt, a sample has more tokens than the 16 that the ")
    assert warnings("seq_len=16", "sample_tokens=15") == []
