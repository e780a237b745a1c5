"""What a run says of itself before and after, against numbers worked out by hand."""

import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import make_run, write_metrics, write_recipe
from recipes import make_recipe

from megazh.model import attention
from megazh.model.counts import parameter_counts
from megazh.pipeline.memory import stage_parameters
from megazh.pipeline.precision import Precision
from megazh.training.layout import make_layout
from megazh.training.recipe import Recipe, load_recipe, recipe_path
from megazh.training.run_folder import RunFolder
from megazh.training.summary import describe_end, describe_kernels, describe_layout, describe_parts, describe_stages

LONGER, ANEW = "the longer one", "the new one"


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> RunFolder:
    """A complete run of six steps."""
    recipe = write_recipe(tmp_path / "mini.yaml", stories, sample_prompts=["it's 从前", "小兔子"])
    found = make_run(tmp_path / "a run", recipe)
    write_metrics(found, 6, seconds=0.5)
    return found


def test_what_computes_is_told_and_why_not_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(stages: int = 1, **changes: Any) -> str:
        return describe_kernels(make_recipe(**changes), torch.device("cuda", 0), Precision.BF16, stages)

    monkeypatch.setattr(attention, "why_not", lambda device, dtype: None)
    assert told() == "Triton's, a micro-batch recorded as one CUDA graph"
    assert told(stages=2) == told(cuda_graph=False) == told(grad_accum_dtype="bf16") == "Triton's"
    assert told(kernels="torch") == "torch's, as kernels=torch wants"
    assert told(model={"mlp": "gelu"}) == "torch's, slower than Triton's: only swiglu has a kernel"
    monkeypatch.setattr(attention, "why_not", lambda device, dtype: "there is no C compiler; install gcc")
    assert told() == "torch's, slower than Triton's: there is no C compiler; install gcc"


def test_layout_of_the_half_billion() -> None:
    recipe = load_recipe(recipe_path("qwen0.5b_6x3090"))
    lines = list(describe_layout(recipe, make_layout(recipe, 6), "cuda", RunFolder(Path("runs/big"))))
    assert lines == [
        "run         runs/big",
        "model       463,987,712 parameters, 24 layers x 1024",
        "layout      6 GPUs = 2 stages x 3 replicas, bf16",
        "batch       8 x 32 micro-batches x 3 replicas x 1024 = 786,432 tokens a step",
        "length      38,147 steps, 30,000,021,504 tokens",
    ]


def test_on_the_cpu_ranks_are_processes_and_auto_is_fp32() -> None:
    recipe = load_recipe(recipe_path("demo"))
    lines = list(describe_layout(recipe, make_layout(recipe, 2), "cpu", RunFolder(Path("x"))))
    assert "layout      2 CPU processes = 2 stages x 1 replicas, fp32" in lines


def test_table_of_stages_by_hand() -> None:
    recipe = load_recipe(recipe_path("qwen0.5b_6x3090"), ["stage_bounds=[0,20,26]"])
    _, first, second = describe_stages(recipe, make_layout(recipe, 6), "cuda")
    layer, head = 6 * 12_845_056 + 6 * 1024 * 1024, 6 * 151_936 * 1024
    whole = 24 * layer + head
    embedding, block = 151_936 * 1024, 12_850_176
    assert first.split()[:4] == ["0", "embedding", "+", "19"]
    assert first.split()[5:7] == [f"{embedding + 19 * block:,}", f"{19 * layer / whole:.1%}"]
    assert second.split()[:5] == ["1", "5", "layers", "+", "head"]
    assert second.split()[5:7] == [f"{embedding + 5 * block + 1024:,}", f"{(5 * layer + head) / whole:.1%}"]


@pytest.mark.parametrize(
    ("begin", "end", "text"),
    [
        (0, 6, "embedding + 4 layers + head"),
        (0, 1, "embedding"),
        (0, 2, "embedding + 1 layer"),
        (1, 5, "4 layers"),
        (4, 6, "1 layer + head"),
        (5, 6, "head"),
    ],
)
def test_parts(begin: int, end: int, text: str) -> None:
    assert describe_parts(make_recipe(model={"num_hidden_layers": 4}), begin, end) == text


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_the_stages_sum_up(tied: bool) -> None:
    recipe = make_recipe(model={"num_hidden_layers": 4, "tie_word_embeddings": tied})
    counts = parameter_counts(recipe.model)
    assert _sum(recipe, [0, 6]) == counts.total
    for bounds in ([0, 3, 6], [0, 1, 5, 6]):
        assert _sum(recipe, bounds) == counts.total + (counts.embedding if tied else 0), "a tied matrix has two copies"


def _sum(recipe: Recipe, bounds: list[int]) -> int:
    return sum(stage_parameters(recipe.model, a, b) for a, b in pairwise(bounds))


def test_end_of_a_run(run: RunFolder) -> None:
    lines = list(describe_end(run, run.recipe(), LONGER, ANEW))
    assert lines[1:] == [
        f"{run.path}: complete, 6 steps",
        "loss        4.0000 at step 1, 1.5000 at the end",
        "validation  5.0000 before, 2.5000 after; 4.000 and 2.000 bits a byte",
        "sample      问1|二 二",
        "sample      问2|三",
        f"plot        {run.plot}",
        "time        3 s in 6 steps, 0.0 TFLOP",
        "",
        "go on:",
        lines[-4],
        lines[-3],
        f"  {LONGER}    # train on, twice as long",
        f"  {ANEW}    # another run from the start",
    ]
    assert shlex.split(lines[-4]) == ["megazh", "sample", str(run.path), "it's 从前"], "quoted for a shell"
    assert shlex.split(lines[-3]) == ["tensorboard", "--logdir", str(run.path / "tensorboard")]
    assert run.plot.read_bytes().startswith(b"\x89PNG")


def test_end_of_a_run_without_validation(run: RunFolder) -> None:
    metrics = run.path / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if '"kind": "validation"' not in line]
    metrics.write_text("\n".join(kept) + "\n")
    lines = list(describe_end(run, run.recipe(), LONGER, ANEW))
    assert not any(line.startswith("validation") for line in lines)
    assert "loss        4.0000 at step 1, 1.5000 at the end" in lines
