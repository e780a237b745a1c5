"""The engine where a step goes wrong: no number, no label, copies that differ."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.ladder_rank import DECAY, LEARNING_RATE
from ranks import run_ranks

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "stage_rank.py"
PRECISIONS = ["tied", "tied bf16", "untied"]
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two stages found."""
    jobs = [f"{job}/{name}" for job in ("not_finite", "no_labels") for name in PRECISIONS]
    folder = tmp_path_factory.mktemp("engine")
    return run_ranks(SCRIPT, 2, [2, *jobs, "tampered/tied", "tampered/tied bf16"], folder, timeout=180)


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_step_that_is_not_finite_is_skipped_and_counted(found: Found, name: str) -> None:
    for rank in found:
        told = rank[f"not_finite/{name}"]
        assert [math.isfinite(loss) for loss in told["losses"]] == [True, False, True]
        assert told["skipped"] == [0, 1, 1]
        before, after, later = told["weights"]
        for key in before:
            assert torch.equal(before[key], after[key]), key
            assert later[key].isfinite().all(), key
        assert any(not torch.equal(after[key], later[key]) for key in after), "it goes on"


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_step_without_labels_only_decays(found: Found, name: str) -> None:
    for rank in found:
        told = rank[f"no_labels/{name}"]
        assert (told["loss"], told["skipped"]) == (0.0, 0)
        for key, before in told["before"].items():
            factor = 1 - LEARNING_RATE * DECAY if before.dim() > 1 else 1.0
            wanted = (before.float() * factor).to(before.dtype)
            torch.testing.assert_close(told["weights"][key], wanted, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ["tied", "tied bf16"])
def test_copies_of_the_embedding_that_differ_in_one_bit_stop_the_run(found: Found, name: str) -> None:
    for rank in found:
        error = rank[f"tampered/{name}"]["error"]
        assert error.startswith("the tied embedding differs between rank 0 (checksum ")
        assert "and rank 1 (" in error
        assert error.endswith("training is stopped; resume from the last checkpoint")
