"""The engine when a step goes wrong (loss not finite, no labels, tied copies differ), and without a compiler."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.ladder_rank import CASES, DECAY
from processes import run_command
from ranks import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "stage_rank.py"
PRECISIONS = ["tied", "tied bf16", "untied"]
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Results of the two ranks of a pipeline."""
    jobs = [f"{job}/{name}" for job in ("not_finite", "no_labels") for name in PRECISIONS]
    folder = tmp_path_factory.mktemp("engine")
    return run_ranks(
        SCRIPT,
        2,
        [2, *jobs, "tampered/tied", "tampered/tied bf16", "vetoed/tied", "frozen/untied", "frozen_stage/untied"],
        folder,
        timeout=180,
    )


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_step_that_is_not_finite_is_skipped_and_counted(found: Found, name: str) -> None:
    for rank in found:
        results = rank[f"not_finite/{name}"]
        assert [math.isfinite(loss) for loss in results["losses"]] == [True, False, True]
        assert results["skipped"] == [0, 1, 1]
        before, after, later = results["weights"]
        for key in before:
            assert torch.equal(before[key], after[key]), key
            assert later[key].isfinite().all(), key
        assert any(not torch.equal(after[key], later[key]) for key in after), "training continues"


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_step_without_labels_only_decays(found: Found, name: str) -> None:
    for rank in found:
        results = rank[f"no_labels/{name}"]
        assert (results["loss"], results["skipped"]) == (0.0, 0)
        for key, before in results["before"].items():
            factor = 1 - CASES[name].learning_rate * DECAY if before.dim() > 1 else 1.0
            wanted = (before.float() * factor).to(before.dtype)
            torch.testing.assert_close(results["weights"][key], wanted, msg=lambda m, k=key: f"{k}: {m}")


def test_a_step_that_one_rank_refuses_changes_no_weight_on_any(found: Found) -> None:
    for rank in found:
        results = rank["vetoed/tied"]
        assert results["skipped"] == 1
        assert results["updates"] == 1
        for key, before in results["before"].items():
            assert torch.equal(before, results["weights"][key]), key
    seen = [rank["vetoed/tied"]["seen"] for rank in found]
    assert seen[0] == seen[1], "loss and norm are the same on all ranks"


def test_frozen_parameters_stay_and_the_others_move(found: Found) -> None:
    moved = {}
    for rank in found:
        results = rank["frozen/untied"]
        moved.update({key: not torch.equal(old, results["weights"][key]) for key, old in results["before"].items()})
    assert {key for key in moved if not moved[key]} == {"0.weight", "1.mlp.up_proj.weight"}
    assert sum(moved.values()) > 10


def test_a_stage_may_be_frozen_as_a_whole(found: Found) -> None:
    moved, losses = {}, []
    for rank in found:
        results = rank["frozen_stage/untied"]
        losses.append(results["losses"])
        moved.update({key: not torch.equal(old, results["weights"][key]) for key, old in results["before"].items()})
    assert [rank["frozen_stage/untied"]["trained"] for rank in found] == [False, True]
    assert losses[0] == losses[1]
    assert {key for key in moved if moved[key]} == {key for key in moved if not key.startswith(("0.", "1."))}


@pytest.mark.parametrize("name", ["tied", "tied bf16"])
def test_copies_of_the_embedding_that_differ_in_one_bit_stop_the_run(found: Found, name: str) -> None:
    for rank in found:
        error = rank[f"tampered/{name}"]["error"]
        assert error.startswith("the tied embedding differs between rank 0 (checksum ")
        assert "and rank 1 (" in error
        assert error.endswith("training is stopped; resume from the last checkpoint")


RANK = """
import os
from megazh.pipeline.engine import use_no_compiled_operators
use_no_compiled_operators()
import deepspeed, torch
deepspeed.init_distributed("gloo")
sums = torch.ones(3) * (1 + int(os.environ["RANK"]))
deepspeed.comm.all_reduce(sums)
print(sums.tolist())
torch.distributed.destroy_process_group()
"""
LAUNCHER = "import sys; from pathlib import Path; from megazh.cluster.launchers.local import run_ranks; "


def test_ranks_reduce_without_a_compiler(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    run = LAUNCHER + "sys.exit(run_ranks([sys.argv[1]], 2, {}, None, Path('logs')))"
    # Compiled operators would go to this folder; and no compiler can be found.
    environment = {
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "PATH": "/nowhere",
        "CXX": "/nowhere/c++",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    finished = run_command([sys.executable, "-c", run, tmp_path / "rank.py"], 120, environment, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "[3.0, 3.0, 3.0]"
    assert (tmp_path / "logs" / "rank_1.log").read_text().splitlines()[-1] == "[3.0, 3.0, 3.0]"
    assert not (tmp_path / "extensions").exists()
