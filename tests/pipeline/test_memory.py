"""Memory of a stage: compared with measurements on a GPU, and the effect of each setting."""

from typing import Any

import pytest
import torch
from decoders import packed, small

from megazh.model.attention import Documents
from megazh.model.backend import Backend
from megazh.model.counts import parameter_counts
from megazh.model.decoder import Decoder, run_layers
from megazh.model.lora_config import LoraConfig, Target
from megazh.pipeline.memory import StageMemory, block_activations, checkpoint_bytes, stage_memory
from megazh.training.layout import make_layout
from megazh.training.recipe import Device, load_recipe
from megazh.training.recipe_files import recipe_path
from megazh.training.stages import work_of

GIB = 2**30


def memory(name: str, ranks: int, stages: int, stage: int, begin: int, end: int, *settings: str) -> StageMemory:
    """Memory of a stage of a recipe that comes with megazh."""
    recipe = load_recipe(recipe_path(name), list(settings))
    layout = make_layout(recipe, ranks, stages)
    return stage_memory(work_of(recipe, layout, recipe.precision.on(Device.CUDA)), stage, begin, end)


# Largest allocations on an H100, torch 2.11 (docs/performance.md). The first two are stages measured without the other
# ranks (tools/bench/stage_memory.py), the third is the larger of two stages in a training run, the fourth a run on one
# GPU.
MEASURED: list[tuple[tuple[Any, ...], float]] = [
    (("minillm_1.4b", 6, 2, 0, 0, 12), 13.92),
    (("minillm_1.4b", 6, 2, 1, 12, 18), 10.40),
    (("qwen0.5b_6x3090", 2, 2, 0, 0, 17, "micro_batch_size=16", "global_batch_size=256"), 22.82),
    (("longlora_qwen0.5b_6x3090", 1, 1, 0, 0, 26, "lora.rank=0", "train_embed_norm=false"), 16.35),
]


@pytest.mark.parametrize(("stage", "measured"), MEASURED)
def test_within_a_tenth_of_what_was_measured(stage: tuple[Any, ...], measured: float) -> None:
    assert memory(*stage).total / GIB == pytest.approx(measured, rel=0.1)


def whole(*settings: str, ranks: int = 6) -> StageMemory:
    """Memory of the 0.5B model in one stage."""
    return memory("qwen0.5b_6x3090", ranks, 1, 0, 0, 26, *settings)


def test_half_a_billion_fits_a_3090_without_recomputation() -> None:
    assert whole().total < 22.5 * GIB


def test_replicas_share_the_optimizer_state() -> None:
    state = 12 * parameter_counts(load_recipe(recipe_path("qwen0.5b_6x3090")).model).total
    assert whole().optimizer == pytest.approx(state / 6)
    assert whole(ranks=1).optimizer == pytest.approx(state)


def test_gradients_exist_once() -> None:
    assert whole().gradients == 2 * whole().weights, "in fp32, beside weights in bf16"
    assert whole("kernels=torch").gradients == 3 * whole().weights, "for a while also in bf16"


def test_kernels_keep_less() -> None:
    assert whole().activations < 0.85 * whole("kernels=torch").activations


def test_recomputation_keeps_little() -> None:
    assert whole("activation_checkpointing=true").activations < 0.2 * whole().activations


LORA = ("lora.rank=8", "initial_checkpoint=base")


def test_lora_has_state_and_gradients_of_its_pairs_alone() -> None:
    pairs = 24 * 8 * 8 * 1024  # four square matrices in 24 layers: rank x (rows + columns)
    found, full = whole(*LORA), whole()
    assert found.gradients == 4 * pairs
    assert found.optimizer == pytest.approx(12 * pairs / 6)
    assert found.weights == full.weights + 2 * pairs
    assert found.activations < full.activations
    table = 151_936 * 1024
    with_table = whole(*LORA, "lora.train_embed_norm=true")
    assert with_table.gradients == 4 * (pairs + table + 49 * 1024)
    assert whole(*LORA, "optimizer.name=muon").optimizer < found.optimizer


@pytest.mark.parametrize("targets", [["q", "o"], ["v", "gate"], ["down"]])
def test_what_a_block_keeps_is_what_it_saves(targets: list[str]) -> None:
    """Fused blocks, in Triton's interpreter: bytes of the tensors that are saved for the backward pass."""
    config, lora = small(num_key_value_heads=2), LoraConfig(rank=3, targets=[Target(each) for each in targets])
    _, _, positions, cu_seqlens = packed([[6, 5, 5], [3, 1, 9]], 16)
    for settings in (None, lora):
        model = Decoder(config, 3, lora=settings)
        attend = Documents(config, Backend.FUSED)(positions, cu_seqlens)
        states = torch.randn(2, 16, config.hidden_size, requires_grad=True)
        saved: list[int] = []

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run_layers(None, model.blocks, None, states, attend, False)
        assert sum(saved) == 32 * 2 * block_activations(config, 4, True, settings)


def stage_of(stage: int, *settings: str) -> StageMemory:
    """Memory of a stage of the 0.5B model in two stages."""
    bounds = (0, 18, 26)
    return memory("qwen0.5b_6x3090", 2, 2, stage, bounds[stage], bounds[stage + 1], *settings)


def test_the_head_keeps_its_logits_gradient_while_weights_wait() -> None:
    logits = 8 * 1024 * 151_936 * 2
    assert stage_of(1).head == 2 * logits, "for this micro-batch and for the one before"
    assert stage_of(1, "activation_checkpointing=true").head <= logits, "recomputation defers no weight gradient"
    assert stage_of(0).head == 0


def test_sums_that_travel_in_another_dtype_need_a_bucket() -> None:
    assert whole().reduction == pytest.approx(2 * 50_000_000 * 7 / 6)
    assert whole("communication_dtype=fp32").reduction == 0
    assert whole(ranks=1).reduction == 0


def test_each_optimizer_has_its_state() -> None:
    parameters, rest = 463_987_712, 463_987_712 - 24 * 4 * 1024 * 1024 - 24 * 3 * 1024 * 2816
    assert whole("dtype=fp32", ranks=1).optimizer == 8 * parameters, "fp32 weights are their own masters"
    assert whole("optimizer.name=muon", ranks=1).optimizer == 8 * parameters + 4 * rest, "one average of matrices"
    assert whole("optimizer.name=adamw8bit", ranks=1).optimizer == (6 + 1 / 32) * parameters
    assert whole("optimizer.name=fused_adam").optimizer == whole().optimizer


def test_muon_needs_memory_while_it_updates() -> None:
    assert whole("optimizer.name=muon", ranks=1).reduction == 8 * (24 * 4 * 1024 * 1024 + 24 * 3 * 1024 * 2816)
    assert whole(ranks=1).reduction == 0


def test_the_size_of_checkpoints() -> None:
    """The size that a run of this recipe was seen to write, 6.5 GB; the same in every layout."""
    recipe = load_recipe(recipe_path("qwen0.5b_6x3090"))
    layout = make_layout(recipe, 6, 2)
    work = work_of(recipe, layout, recipe.precision.on(Device.CUDA))
    assert checkpoint_bytes(work) / 1e9 == pytest.approx(6.50, abs=0.01)


def test_rows_that_pad_the_vocabulary_take_memory() -> None:
    odd, even = (memory("llama_16x1024", 1, 1, 0, 0, 18, f"vocab_size={vocab}") for vocab in (64_793, 64_832))
    assert odd == even
