"""Checks before the start: changes that a resume may make, and the layout that the job records."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import add_checkpoint, make_run, write_recipe
from recipes import make_recipe

from megazh.errors import SeveralErrors, UsageError
from megazh.run.folder import RunFolder
from megazh.training.checks.resume import check_resume, same_run
from megazh.training.job import Devices, Job, Request, make_job
from megazh.training.live import changed, given_on_command_line
from megazh.training.preflight import requested_case
from megazh.training.recipe import Device, Recipe, load_recipe, run_recipe


def job_of(run: RunFolder, recipe: Recipe, ranks: int = 1, request: Request | None = None) -> Job:
    """A job in this run folder, on the CPU."""
    return make_job(request or Request(), recipe, run.path, Path("data_index"), Devices(Device.CPU, ranks, None))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a run that was started with the small recipe."""
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    folder.config.write_text(job_of(folder, make_recipe()).recipe.to_yaml(), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 20},
        {"steps": None, "tokens": 4096},
        {"learning_rate": 1e-4, "warmup": 3.0, "min_lr_ratio": 0.5, "weight_decay": 0.0, "max_grad_norm": 0.0},
        {"micro_batch_size": 4, "activation_checkpointing": True, "pipe_parallel_size": 1},
        {"checkpoint_every": 3, "sample_prompts": ["小狗"], "stage_costs": "flops"},
        {"workers": 0, "stories": 7, "manifest": "moved.yaml"},
    ],
)
def test_what_may_change_is_accepted(run: RunFolder, changes: dict[str, Any]) -> None:
    recipe = make_recipe(**changes)
    check_resume(job_of(run, recipe))
    assert recipe != make_recipe()


@pytest.mark.parametrize(
    ("changes", "key", "old", "new"),
    [
        ({"seed": 43}, "schedule.seed", 42, 43),
        ({"z_loss": 0.1}, "optimizer.z_loss", 0.0, 0.1),
        ({"seq_len": 32}, "batch.seq_len", 16, 32),
        ({"global_batch_size": 16}, "batch.global_batch_size", 8, 16),
        ({"betas": [0.9, 0.99]}, "optimizer.betas", [0.9, 0.95], [0.9, 0.99]),
        ({"dtype": "fp32"}, "precision.dtype", "bf16", "fp32"),
        ({"packing": "concat"}, "data.packing", "best_fit", "concat"),
        ({"workers": 1, "max_docs": 5}, "data.max_docs", None, 5),
    ],
)
def test_what_decides_the_result_may_not_change(
    run: RunFolder, changes: dict[str, Any], key: str, old: object, new: object
) -> None:
    with pytest.raises(UsageError) as refusal:
        check_resume(job_of(run, make_recipe(**changes)))
    assert str(refusal.value).startswith(f"{run.path}: the run was begun with {key}={old}, and this one has {new}; ")
    assert str(refusal.value).endswith("another folder with -r")


def test_all_that_differs_is_refused_at_once(run: RunFolder) -> None:
    recipe = make_recipe(model={"num_hidden_layers": 3, "qkv_bias": True}, seed=3)
    with pytest.raises(SeveralErrors) as refusal:
        check_resume(job_of(run, recipe))
    lines = [str(error) for error in refusal.value.errors]
    for line, part in zip(
        lines,
        ("model.num_hidden_layers=2, and this one has 3", "model.qkv_bias=False, and", "schedule.seed=42, and"),
        strict=True,
    ):
        assert part in line
    assert refusal.value.exit_code == 2
    assert str(refusal.value).split("\nerror: ") == lines, "each is a line of its own on the terminal"


def test_the_layout_that_runs_is_in_the_recipe(run: RunFolder) -> None:
    """`-p` and the devices override the recipe, and config.yaml records the result."""
    recipe = make_recipe(num_gpus=6, pipe_parallel_size=1)
    job = job_of(run, recipe, ranks=4, request=Request(stages=2))
    run.config.write_text(job.recipe.to_yaml(), encoding="utf-8")
    parallel = run_recipe(run).parallel
    assert (parallel.num_gpus, parallel.pipe_parallel_size, parallel.device) == (4, 2, "cpu")
    assert (job.layout.ranks, job.layout.stages, job.layout.replicas) == (4, 2, 2)


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path}: not the folder of a run: config.yaml is missing"):
        run_recipe(RunFolder(tmp_path))


def test_a_run_as_initial_checkpoint_is_its_newest_checkpoint_and_stays_so(tmp_path: Path, stories: Path) -> None:
    base = make_run(tmp_path / "base", write_recipe(tmp_path / "base.yaml", stories), step=3)
    recipe = write_recipe(tmp_path / "tuned.yaml", stories)
    request = Request(recipe=str(recipe), run=tmp_path / "run", settings=[f"initial_checkpoint={base.path}"])

    def initial() -> str | None:
        return requested_case(request).recipe.checkpoint.initial_checkpoint

    first = str(base.checkpoints / "step_00000003")
    assert initial() == first
    case = requested_case(request)
    case.run.begin(case.recipe.to_yaml(), case.recipe.open_mixture())
    add_checkpoint(base, load_recipe(tmp_path / "base.yaml"), 6)
    assert initial() == first, "the run was begun with it"
    request = replace(request, run=tmp_path / "another")
    assert initial() == str(base.checkpoints / "step_00000006")


def test_what_was_set_while_the_run_ran_goes_on_unless_the_command_line_gives_it(tmp_path: Path, stories: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", stories)
    run = make_run(tmp_path / "run", path, step=3)
    set_live = changed(run_recipe(run), [], 4, ["learning_rate=3e-4", "keep_last=9"])
    run.set_changes(set_live)
    request = Request(recipe=str(path), run=run.path, device="cpu")

    def start(*settings: str) -> tuple[float, int, list[str]]:
        case = requested_case(replace(request, settings=list(settings)))
        lines = [line for line in same_run(case) if "optimizer.learning_rate is " in line]
        given = given_on_command_line(case.settings)
        case.run.begin(case.recipe.to_yaml(), case.recipe.open_mixture(), given=given)
        recipe = run_recipe(run)
        assert recipe.optimizer == case.recipe.optimizer
        return recipe.optimizer.learning_rate, recipe.checkpoint.keep_last, lines

    rate, keep, (line,) = start()
    assert (rate, keep, run.changes()) == (3e-4, 9, set_live)
    assert "is 0.0003, as 'megazh ctl' set it, from step 5 on, and 0.01 before; give learning_rate=VALUE" in line
    rate, keep, (line,) = start("optimizer.learning_rate=5e-4")
    assert (rate, keep, [each.key for each in run.changes()]) == (5e-4, 9, ["checkpoint.keep_last"])
    assert "is the command line's, no longer 0.0003" in line
    rate, keep, lines = start()
    assert (rate, keep, lines) == (1e-2, 9, []), "the recipe's again"


def test_a_repeated_command_takes_back_nothing_that_was_set_while_the_run_ran(tmp_path: Path, stories: Path) -> None:
    """As a scheduler repeats it: only a value that the last command did not have wins."""
    path = write_recipe(tmp_path / "recipe.yaml", stories)
    run = make_run(tmp_path / "run", path, step=3)
    request = Request(recipe=str(path), run=run.path, device="cpu")

    def start(*settings: str) -> tuple[float, list[str]]:
        case = requested_case(replace(request, settings=list(settings)))
        lines = [line for line in same_run(case) if "optimizer.learning_rate is " in line]
        given = given_on_command_line(case.settings)
        case.run.begin(case.recipe.to_yaml(), case.recipe.open_mixture(), given=given)
        return run_recipe(run).optimizer.learning_rate, lines

    assert start("learning_rate=1e-3") == (1e-3, [])
    run.set_changes(changed(run_recipe(run), [], 4, ["learning_rate=3e-4"]))
    for _ in range(2):
        rate, (line,) = start("optimizer.learning_rate=0.001")
        assert rate == 3e-4
        assert line.endswith("; the command's learning_rate=0.001 is the last start's, and older; give another")
    rate, (line,) = start("learning_rate=2e-3")
    assert (rate, "is the command line's" in line) == (2e-3, True)
    assert start("learning_rate=1e-3") == (1e-3, [])
