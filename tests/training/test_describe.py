"""The lines that describe a run before it starts, compared with numbers worked out by hand."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import make_recipe

from megazh.kernels import support
from megazh.model.counts import parameter_counts
from megazh.pipeline.memory import stage_parameters
from megazh.training.describe import describe_course, describe_job, describe_kernels, describe_stages
from megazh.training.job import Devices, Job, Request, make_job
from megazh.training.layout import make_layout
from megazh.training.recipe import Device, Recipe, load_recipe
from megazh.training.recipe_files import recipe_path
from megazh.training.stages import work_of


def job_of(name: str, ranks: int, device: Device, *settings: str) -> Job:
    """The job of a recipe that comes with megazh, on `ranks` ranks."""
    recipe = load_recipe(recipe_path(name), list(settings))
    return make_job(Request(), recipe, Path("runs/big"), Path("data_index"), Devices(device, ranks, None))


def test_the_implementation_is_named_and_why_it_is_not_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def described(stages: int = 1, **changes: Any) -> str:
        recipe = make_recipe(pipe_parallel_size=stages, **changes)
        work = work_of(recipe, make_layout(recipe, stages), recipe.precision.on(Device.CUDA))
        return describe_kernels(recipe, torch.device("cuda", 0), work)

    monkeypatch.setattr(support, "why_not", lambda device, dtype: None)
    assert described() == "Triton, each pass of a micro-batch one CUDA graph"
    assert described(cuda_graph=False) == "Triton"
    assert described(kernels="torch") == "torch (kernels=torch)"
    assert described(model={"mlp": "gelu"}) == "torch, slower than Triton: only swiglu has a kernel"
    monkeypatch.setattr(support, "why_not", lambda device, dtype: "there is no C compiler; install gcc")
    assert described() == "torch, slower than Triton: there is no C compiler; install gcc"


def test_layout_of_the_half_billion() -> None:
    assert list(describe_job(job_of("qwen0.5b_6x3090", 6, Device.CUDA))) == [
        "run         runs/big",
        "model       463,987,712 parameters, 24 layers x 1024",
        "layout      6 GPUs = 2 stages x 3 replicas, bf16",
        "batch       8 x 32 micro-batches x 3 replicas x 1024 = 786,432 tokens per step",
        "length      38,147 steps, 30,000,021,504 tokens",
        "rate        cosine: 5.00e-04 after 381 steps of warm-up, 5.00e-05 at the end",
    ]


def test_a_course_that_changes_is_a_table() -> None:
    course = make_recipe(
        steps=None, tokens=4096, kind="wsd", decay=4, warmup=2, length={0: 4, "1K": 16},
        **{"schedule.batch": {0: 8, "1K": 16, "1M": 24}},
    ).course  # fmt: skip
    assert list(describe_course(course)) == [
        "rate        wsd: 1.00e-03 after 2 steps of warm-up, held to step 16, then 4 steps of decay to 1.00e-04",
        "course      from step   tokens so far    batch   length    first rate   last rate",
        "                    1               0        8        4      5.00e-04    1.00e-03",
        "                    9           1,024       16       16      1.00e-03    1.00e-04",
    ]
    assert list(describe_course(make_recipe(kind="constant", warmup=0).course)) == ["rate        constant: 1.00e-03"]


def test_on_the_cpu_ranks_are_processes_and_auto_is_fp32() -> None:
    lines = list(describe_job(job_of("demo", 2, Device.CPU)))
    assert "layout      2 CPU processes = 2 stages x 1 replicas, fp32" in lines


def test_table_of_stages_by_hand() -> None:
    _, first, second = describe_stages(job_of("qwen0.5b_6x3090", 6, Device.CUDA, "stage_bounds=[0,20,26]"))
    layer, head = 6 * 12_845_056 + 6 * 1024 * 1024, 6 * 151_936 * 1024
    whole = 24 * layer + head
    embedding, block = 151_936 * 1024, 12_850_176
    assert first.split()[:4] == ["0", "embedding", "+", "19"]
    assert first.split()[5:7] == [f"{embedding + 19 * block:,}", f"{19 * layer / whole:.1%}"]
    assert second.split()[:5] == ["1", "5", "layers", "+", "head"]
    assert second.split()[5:7] == [f"{embedding + 5 * block + 1024:,}", f"{(5 * layer + head) / whole:.1%}"]


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_the_stages_sum_up(tied: bool) -> None:
    recipe = make_recipe(model={"num_hidden_layers": 4, "tie_word_embeddings": tied})
    counts = parameter_counts(recipe.model)
    assert _sum(recipe, [0, 6]) == counts.total
    for bounds in ([0, 3, 6], [0, 1, 5, 6]):
        assert _sum(recipe, bounds) == counts.total + (counts.embedding if tied else 0), "a tied matrix has two copies"


def _sum(recipe: Recipe, bounds: list[int]) -> int:
    return sum(stage_parameters(recipe.model, a, b) for a, b in pairwise(bounds))
