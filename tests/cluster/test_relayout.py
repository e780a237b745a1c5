"""Layouts on another number of GPUs than the recipe is made for, or than the run had before."""

from dataclasses import replace
from pathlib import Path

import pytest
from cases import make_case, on_cpu, on_gpus
from made_runs import make_run, write_recipe

from megazh.cluster.relayout import relaid
from megazh.errors import UsageError
from megazh.training.job import Case, Request

ALLOWED = Request(allow_relayout=True, stages=2)


def layout(case: Case) -> tuple[int, int, int]:
    """GPUs, stages and size of a micro-batch."""
    found = case.job.layout
    return found.ranks, found.stages, found.micro_batch_size


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, (1, 1, 2)),
        (2, (2, 2, 2)),  # as it is
        (3, (3, 3, 2)),  # 3 replicas do not divide 8 samples
        (4, (4, 2, 2)),
        (5, (4, 2, 2)),  # the model has 4 parts, and 5 replicas do not divide 8 samples
        (8, (8, 2, 2)),
        (16, (16, 2, 1)),
    ],
)
def test_stages_and_then_the_micro_batch_stay_where_they_fit(
    tmp_path: Path, ranks: int, expected: tuple[int, int, int]
) -> None:
    case, lines = relaid(make_case(tmp_path, devices=on_cpu(ranks), request=ALLOWED))
    assert layout(case) == expected
    as_it_is = expected[1:] == (2, 2) and expected[0] == ranks
    assert len(lines) == (not as_it_is)
    if lines:
        assert lines[0].startswith(f"--allow-relayout: {expected[0]} GPUs: {expected[1]} stages x ")


def test_each_host_has_as_many(tmp_path: Path) -> None:
    case, _ = relaid(make_case(tmp_path, devices=on_cpu(15), request=ALLOWED), hosts=3)
    assert layout(case) == (12, 3, 2), "14 and 13 ranks are not divisible by three hosts"


def test_a_cut_and_an_accumulation_that_fit_no_longer_are_left_out(tmp_path: Path) -> None:
    settings = ["stage_bounds=[0,2,4]", "gradient_accumulation_steps=4"]
    case, _ = relaid(make_case(tmp_path, settings=settings, devices=on_gpus(1), request=ALLOWED))
    assert layout(case) == (1, 1, 2)
    assert case.job.recipe.parallel.stage_bounds is None
    assert case.job.recipe.batch.gradient_accumulation_steps is None


def test_stages_too_large_for_the_cards_are_no_layout(tmp_path: Path) -> None:
    """One card does not hold a model that two hold."""
    model = {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 8, "vocab_size": 512}
    case = make_case(tmp_path, devices=on_gpus(1, 24), request=ALLOWED, model=model)
    with pytest.raises(UsageError, match=r"--allow-relayout: no layout of at most 1 GPUs fits global_batch_size=8"):
        relaid(case)


def test_hugging_faces_trainer_has_one_stage(tmp_path: Path) -> None:
    request = Request(engine="hf", allow_relayout=True)
    case, _ = relaid(make_case(tmp_path, devices=on_cpu(3), request=request, pipe_parallel_size=1))
    assert layout(case) == (2, 1, 2)


def test_without_the_option_only_a_requeued_job_is_refused(
    tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    make_run(tmp_path / "run", write_recipe(tmp_path / "r.yaml", stories, model={"vocab_size": 400}))  # on two GPUs
    case = make_case(tmp_path, stories, model={"vocab_size": 400}, devices=on_cpu(4), request=Request(stages=2))
    assert relaid(case) == (case, []), "started by a person"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(UsageError) as caught:
        relaid(case)
    message = str(caught.value)
    assert "its Slurm job came back with 4 GPUs, and had 2; give --allow-relayout" in message
    assert "\n" not in message
    assert relaid(replace(case, devices=on_cpu(2)))[1] == []
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert relaid(case)[1] == [], "another job than the last"
    lines = relaid(replace(case, request=ALLOWED))[1]
    assert lines == ["--allow-relayout: 4 GPUs (the run had 2): 2 stages x 2 replicas, micro_batch_size=2"]
