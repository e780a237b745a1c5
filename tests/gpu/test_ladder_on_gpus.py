"""The ladder on CUDA, by runs that `megazh pretrain` starts: kernels, graphs, stages, replicas, resume, another layout.

python -m pytest -m gpu                            one or two GPUs; about five minutes
MEGAZH_LADDER_ON=cpu python -m pytest -m gpu       the same runs with gloo and without kernels, to try the tests
"""

import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from processes import run_command
from recipes import in_sections

from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import list_checkpoints, read_manifest

ON_CPU = os.environ.get("MEGAZH_LADDER_ON") == "cpu"
GPUS = 2 if ON_CPU else torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ranks,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, found {GPUS}")
real_gpu = pytest.mark.skipif(ON_CPU, reason="the CPU has neither kernels nor graphs")

STEPS, EVERY = 12, 4
SAME_BITS, FP32, BF16, ROUNDED_STATE = (0.0, 0.0), (1e-5, 1e-3), (0.01, 0.1), (1e-3, 0.02)
"""Largest differences of losses and of gradient norms, relative.

bf16 keeps 8 bits, and other sums round otherwise. So does the state of 8-bit AdamW, and the momentum that Muon
orthogonalizes in bf16.
"""
RECIPE = {
    "model": {
        "vocab_size": 512,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "tie_word_embeddings": True,
    },
    "seq_len": 128,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "steps": STEPS,
    "learning_rate": 3e-3,
    "warmup": 4,
    "max_grad_norm": 0.5,
    "checkpoint_every": EVERY,
    "keep_last": 0,
    "validate_every": 0,
    "validation_samples": 4,
    "sample_every": 0,
    "sample_prompts": [],
    "stage_costs": "flops",
    "communication_dtype": "fp32",
}
LAYOUTS = {"one": (1, 1), "cpu": (1, 1), "pp=2": (2, 2), "dp=2": (2, 1)}
"""Ranks and stages; on GPUs, but `cpu`."""

Run = tuple[Path, str]
"""Folder and output of a finished run."""


@pytest.fixture(scope="module")
def pretrain(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A function that trains to the end in a layout, with settings; each run is made only once.

    With `after`, it goes on from a copy of that run, from the checkpoint of `step`.
    """
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(in_sections({**RECIPE, "data": {"manifest": str(stories)}})))
    # Kernels are compiled here; the tests' own environment has them interpreted.
    environment = {
        "TRITON_INTERPRET": None,
        "MEGAZH_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    made: dict[str, Run] = {}

    def run(layout: str, *settings: str, after: Path | None = None, step: int = 0) -> Run:
        name = " ".join([layout, *settings, *([f"after step {step} of {after.name}"] if after else [])])
        if name in made:
            return made[name]
        path = folder / name.replace(" ", "_").replace("/", "-")
        if after is not None:
            shutil.copytree(after, path)
            for checkpoint in list_checkpoints(path / "checkpoints"):
                if read_manifest(checkpoint).step > step:
                    shutil.rmtree(checkpoint)
        ranks, stages = LAYOUTS[layout]
        command = [sys.executable, "-m", "megazh", "pretrain", "-c", recipe, "-r", path, *settings]
        command += ["--device", "cpu" if ON_CPU or layout == "cpu" else "cuda", "-n", str(ranks), "-p", str(stages)]
        finished = run_command(command, 120, environment, folder)
        assert finished.returncode == 0, f"run '{name}':\n{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}"
        if after is not None:
            assert f"resumed at step {step} of {STEPS}" in finished.stdout, f"run '{name}':\n{finished.stdout[-4000:]}"
        made[name] = path, finished.stdout
        return made[name]

    return run


def losses(run: Run) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, all finite."""
    steps = [record for record in read_metrics(run[0]) if record["kind"] == "step"]
    assert all(math.isfinite(step["loss"]) and not step["skipped"] for step in steps), steps
    return {step["step"]: (step["loss"], step["grad_norm"]) for step in steps}


def assert_equal(one: Run, other: Run, tolerance: tuple[float, float], last: int = STEPS) -> None:
    """Compare losses and gradient norms of the first steps, up to `last`."""
    left, right, steps = losses(one), losses(other), range(1, last + 1)
    assert left.keys() >= set(steps) <= right.keys()
    found = [max(abs(left[n][which] / right[n][which] - 1) for n in steps) for which in (0, 1)]
    lines = [f"loss and norm of '{one[0].name}', loss and norm of '{other[0].name}':"]
    lines += [f"step {n:>2}  {left[n][0]:<20} {left[n][1]:<20}  {right[n][0]:<20} {right[n][1]:<20}" for n in steps]
    lines += [f"largest relative differences {found[0]:.2e} and {found[1]:.2e}; allowed are {tolerance}"]
    assert found[0] <= tolerance[0], "\n".join(lines)
    assert found[1] <= tolerance[1], "\n".join(lines)


def test_noise_on_embeddings(pretrain: Callable[..., Run]) -> None:
    """Fused blocks with noise, whose passes are not recorded: other losses, which fall all the same."""
    plain, noisy = losses(pretrain("one", "dtype=bf16")), losses(pretrain("one", "dtype=bf16", "noise.neftune_alpha=5"))
    assert noisy[STEPS][0] != plain[STEPS][0]
    assert noisy[1][0] == pytest.approx(plain[1][0], rel=0.05)
    assert noisy[1][0] > noisy[5][0] > noisy[STEPS][0] + 0.1, noisy


def test_a_model_learns(pretrain: Callable[..., Run]) -> None:
    """What follows compares runs that train: the loss falls, also after the steps that are compared first."""
    found = losses(pretrain("one", "dtype=bf16"))
    assert list(found) == list(range(1, STEPS + 1))
    assert found[1][0] > found[5][0] > found[STEPS][0] + 0.1, found


S2 = ("attention.pattern=s2", "attention.group_tokens=16")


@real_gpu
@pytest.mark.parametrize("pattern", [(), S2], ids=["full", "s2"])
def test_fused_is_torch(pretrain: Callable[..., Run], pattern: tuple[str, ...]) -> None:
    fused, plain = (pretrain("one", "dtype=bf16", *more, *pattern) for more in ([], ["kernels=torch"]))
    assert "kernels     Triton, each pass of a micro-batch one CUDA graph" in fused[1]
    assert "kernels     torch (kernels=torch)" in plain[1]
    assert_equal(fused, plain, BF16, last=5)


@real_gpu
@pytest.mark.parametrize("pattern", [(), S2], ids=["full", "s2"])
def test_a_graph_is_eager(pretrain: Callable[..., Run], pattern: tuple[str, ...]) -> None:
    recorded, eager = (pretrain("one", "dtype=bf16", *more, *pattern) for more in ([], ["cuda_graph=false"]))
    assert "kernels     Triton, each pass of a micro-batch one CUDA graph" in recorded[1]
    assert "kernels     Triton\n" in eager[1]
    assert_equal(recorded, eager, SAME_BITS)


@real_gpu
def test_s2_is_another_attention(pretrain: Callable[..., Run]) -> None:
    s2, full = (losses(pretrain("one", "dtype=bf16", *pattern)) for pattern in (S2, ()))
    assert s2[1] != full[1], "groups of 16 tokens leave out some of the 128"


LORA = {
    "lora": ("lora.rank=8",),
    "lora of all": ("lora.rank=3", "lora.targets=[q,k,v,o,gate,up,down]", "lora.train_embed_norm=true"),
}
"""Settings of LoRA; a rank of 3 gives products whose rows do not begin at multiples of 16 bytes."""


def lora_run(pretrain: Callable[..., Run], layout: str, case: str, *settings: str) -> Run:
    """A LoRA run on the weights of the run in fp32."""
    base = pretrain("one", "dtype=fp32")[0]
    checkpoint = list_checkpoints(base / "checkpoints")[-1].relative_to(base.parent)
    return pretrain(layout, f"initial_checkpoint={checkpoint}", *LORA[case], *settings)


def test_lora_learns(pretrain: Callable[..., Run]) -> None:
    found = losses(lora_run(pretrain, "one", "lora of all", "dtype=fp32"))
    assert found[1][0] == pytest.approx(losses(pretrain("one", "dtype=fp32"))[STEPS][0], rel=0.2)
    assert found[STEPS][0] < found[1][0] - 0.03, found


@real_gpu
@pytest.mark.parametrize("case", LORA)
def test_lora_fused_is_torch(pretrain: Callable[..., Run], case: str) -> None:
    fused, plain = (lora_run(pretrain, "one", case, "dtype=bf16", *more) for more in ([], ["kernels=torch"]))
    assert "kernels     Triton, each pass of a micro-batch one CUDA graph" in fused[1]
    assert "kernels     torch (kernels=torch)" in plain[1]
    assert_equal(fused, plain, BF16, last=5)


@real_gpu
@pytest.mark.parametrize("case", LORA)
def test_lora_recorded_is_eager(pretrain: Callable[..., Run], case: str) -> None:
    recorded, eager = (lora_run(pretrain, "one", case, "dtype=bf16", *more) for more in ([], ["cuda_graph=false"]))
    assert "kernels     Triton, each pass of a micro-batch one CUDA graph" in recorded[1]
    assert "kernels     Triton\n" in eager[1]
    assert_equal(recorded, eager, SAME_BITS)


@real_gpu
def test_lora_on_a_gpu_is_lora_on_the_cpu(pretrain: Callable[..., Run]) -> None:
    on_gpu, on_cpu = (lora_run(pretrain, layout, "lora of all", "dtype=fp32") for layout in ("one", "cpu"))
    assert_equal(on_gpu, on_cpu, (1e-4, 1e-2))


@two_gpus
@pytest.mark.parametrize("case", LORA)
def test_lora_in_two_stages_is_lora_in_one(pretrain: Callable[..., Run], case: str) -> None:
    assert_equal(lora_run(pretrain, "pp=2", case, "dtype=fp32"), lora_run(pretrain, "one", case, "dtype=fp32"), FP32)


@real_gpu
@two_gpus
@pytest.mark.parametrize("case", LORA)
@pytest.mark.parametrize("layout", ["pp=2", "dp=2"])
def test_lora_on_two_gpus_is_lora_on_one_in_bf16(pretrain: Callable[..., Run], layout: str, case: str) -> None:
    assert_equal(lora_run(pretrain, layout, case, "dtype=bf16"), lora_run(pretrain, "one", case, "dtype=bf16"), BF16)


@two_gpus
@pytest.mark.parametrize("layout", ["pp=2", "dp=2"])
def test_two_gpus_are_one_in_bf16(pretrain: Callable[..., Run], layout: str) -> None:
    assert_equal(pretrain(layout, "dtype=bf16"), pretrain("one", "dtype=bf16"), BF16)


@two_gpus
def test_two_stages_are_one_gpu_in_fp32(pretrain: Callable[..., Run]) -> None:
    assert_equal(pretrain("pp=2", "dtype=fp32"), pretrain("one", "dtype=fp32"), FP32)


@real_gpu
def test_the_kernel_of_apex_computes_adamw(pretrain: Callable[..., Run]) -> None:
    pytest.importorskip("amp_C", reason="needs NVIDIA's apex with its CUDA extensions")
    assert_equal(pretrain("one", "dtype=fp32", "optimizer.name=fused_adam"), pretrain("one", "dtype=fp32"), FP32)


@two_gpus
@pytest.mark.parametrize("layout", ["pp=2", "dp=2"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit", "fused_adam"])
def test_other_optimizers_on_two_gpus_are_one(pretrain: Callable[..., Run], layout: str, optimizer: str) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
        if ON_CPU:
            pytest.skip("bitsandbytes computes it on CUDA only")
    if optimizer == "fused_adam":
        pytest.importorskip("amp_C", reason="needs NVIDIA's apex with its CUDA extensions")
    settings = ("dtype=fp32", f"optimizer.name={optimizer}")
    assert_equal(pretrain(layout, *settings), pretrain("one", *settings), ROUNDED_STATE, last=10)


def test_a_resumed_run_has_the_same_bits(pretrain: Callable[..., Run]) -> None:
    whole = pretrain("one", "dtype=bf16")
    assert_equal(pretrain("one", "dtype=bf16", after=whole[0], step=EVERY), whole, SAME_BITS)


@two_gpus
def test_another_layout_goes_on(pretrain: Callable[..., Run]) -> None:
    """Two stages, from step 4 on two replicas, from step 8 on one GPU."""
    stages, reference = pretrain("pp=2", "dtype=fp32"), pretrain("one", "dtype=fp32")
    replicas = pretrain("dp=2", "dtype=fp32", after=stages[0], step=EVERY)
    assert_equal(replicas, reference, FP32)
    one = pretrain("one", "dtype=fp32", after=replicas[0], step=2 * EVERY)
    assert_equal(one, reference, FP32)
    assert_equal(one, replicas, SAME_BITS, last=2 * EVERY)


GROWING = [
    "dtype=bf16",
    "micro_batch_size=8",
    "schedule.batch={0: 8, 3K: 16, 10K: 24}",
    "schedule.length={0: 16, 6K: 64, 14K: 128}",
]
"""Steps of one micro-batch, then of two and three, in segments that grow."""


@real_gpu
def test_recorded_passes_are_eager_ones_while_the_batch_grows(pretrain: Callable[..., Run]) -> None:
    assert_equal(pretrain("one", *GROWING), pretrain("one", *GROWING, "cuda_graph=false"), SAME_BITS)


@two_gpus
def test_a_batch_that_grows_in_two_stages(pretrain: Callable[..., Run]) -> None:
    """Recorded passes stay valid with more micro-batches in flight."""
    staged = pretrain("pp=2", *GROWING)
    assert_equal(staged, pretrain("one", *GROWING), BF16)
    assert_equal(staged, pretrain("pp=2", *GROWING, "cuda_graph=false"), SAME_BITS)
    for step in (EVERY, 2 * EVERY):
        assert_equal(pretrain("pp=2", *GROWING, after=staged[0], step=step), staged, SAME_BITS)
