"""The tool that measures the memory of single stages: its motions on the CPU, where memory is not measured."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
from processes import Finished, run_command

TOOL = Path(__file__).parents[3] / "tools" / "bench" / "stage_memory.py"
POISON = "import torch\ntorch.use_deterministic_algorithms(True, warn_only=True)\n"
"""Runs as each Python process starts: from then on torch fills new memory with NaN."""


def tool(*options: object, env: dict[str, str | None] | None = None) -> Finished:
    return run_command([sys.executable, TOOL, *map(str, options)], timeout=300, env=env)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stages", "settings"),
    [
        (6, 1, ["dtype=bf16", "communication_dtype=bf16"]),
        (6, 2, ["dtype=fp32", "activation_checkpointing=true"]),
        (6, 3, ["dtype=bf16", "communication_dtype=bf16"]),
        (1, 1, ["dtype=bf16", "lora.rank=4", "initial_checkpoint=runs/that_is_not_here"]),
    ],
    ids=["six replicas", "two stages, recomputed", "first, middle and last stage", "one rank, low-rank pairs"],
)
def test_every_stage_takes_its_steps_on_numbers_that_were_written(
    ranks: int, stages: int, settings: list[str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(POISON)
    paths = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    written = tmp_path / "memory.json"
    result = tool(
        "demo", "-n", ranks, "-p", stages, "--device", "cpu", "--json", written, "micro_batch_size=1", *settings,
        env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(written.read_text())["stages"]
    assert [stage["stage"] for stage in found] == list(range(stages))
    assert found[0]["holds"].startswith("embedding")
    assert found[-1]["holds"].endswith("head")
    for stage in found:
        assert stage["plan"] > 0
        assert len(stage["grad_norms"]) == 3
        assert all(math.isfinite(norm) and norm > 0 for norm in stage["grad_norms"]), stage
    assert [stage["losses"] is not None for stage in found] == [False] * (stages - 1) + [True]
    assert all(math.isfinite(loss) and loss > 0 for loss in found[-1]["losses"])
    lines = result.stdout.splitlines()
    assert f"{ranks} GPUs = {stages} stages x {ranks // stages} replicas" in lines[0]
    assert lines[1].split() == ["stage", "holds", "allocated", "reserved", "plan", "allocated", "/", "plan"]
    for line in lines[2:-1]:
        assert line.split()[-5:] == ["-", "-", line.split()[-3], "GiB", "-"], "nothing is measured on a CPU"
    assert lines[-1] == "3 steps taken by each stage; memory is measured on a GPU only"


def test_layouts_that_cannot_be_measured_are_refused_in_one_line() -> None:
    for options, says in {
        ("-n", 5, "-p", 2): "error: -n 5 GPUs do not divide into -p 2",
        ("-n", 2, "-p", 2, "zero_stage=0"): "error: zero_stage=0: ",
    }.items():
        result = tool("demo", *options, "--device", "cpu")
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1].startswith(says)


def test_figures_stand_beside_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    from stage_memory import _figures

    gib = 2**30
    found = _figures({"allocated": 13.92 * gib, "reserved": 14.07 * gib}, 13.64 * gib)
    assert found.split() == ["13.92", "GiB", "14.07", "GiB", "13.64", "GiB", "1.021", "x"]


def test_a_skipped_step_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    from stage_memory import _check

    from megazh.errors import WorkerError
    from megazh.run.metrics import StepRecord

    fields = dict.fromkeys(StepRecord.__dataclass_fields__, 1)
    good = StepRecord(**{**fields, "skipped": False})
    _check([good])
    with pytest.raises(WorkerError, match="was skipped"):
        _check([good, StepRecord(**{**fields, "skipped": True})])
    with pytest.raises(WorkerError, match="gradient norm nan"):
        _check([StepRecord(**{**fields, "skipped": False, "grad_norm": math.nan})])
