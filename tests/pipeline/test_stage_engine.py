"""The engine replaces exactly the code of DeepSpeed that it was written against, and only where it can."""

import hashlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import TrainSchedule

from megazh.pipeline.precision import WRITTEN_AGAINST
from megazh.pipeline.schedule import SplitSchedule
from megazh.pipeline.stage_engine import StageEngine, _counted

# First digits of the SHA-256 of each function's source in DeepSpeed 0.19.8. If one differs, read the change, make sure
# that `stage_engine.py` still does all that DeepSpeed's code does, and put the new digest here.
SOURCES = {
    PipelineEngine._exec_load_micro_batch: "2243e24e1b7f",
    PipelineEngine._exec_forward_pass: "cf4dfb0f5996",
    PipelineEngine._exec_backward_pass: "ae2eeff56b84",
    PipelineEngine._exec_send_activations: "c2127e600a54",
    PipelineEngine._exec_recv_activations: "04213b4788a2",
    PipelineEngine._exec_send_grads: "fc5d06a5dddd",
    PipelineEngine._exec_recv_grads: "b0c95dcc5b81",
    PipelineEngine._exec_reduce_tied_grads: "00d7e6e1e18d",
    PipelineEngine._exec_reduce_grads: "3620e2a941f0",
    PipelineEngine._bf16_reduce_grads: "9b1ca8cb866b",
    PipelineEngine._exec_schedule: "f162568c9f2b",
    PipelineEngine._train_schedule: "8423c0c94dd2",
    PipelineEngine._aggregate_total_loss: "562a551f9875",
    PipelineEngine._recv_tensor_meta: "ab38845ae896",
    PipelineEngine.eval_batch: "439640583d69",
    PipelineEngine._reduce_outputs: "2fc5a5aabb8c",
    PipelineEngine._bcast_pipe_scalar: "13b548592a59",
    DeepSpeedEngine._take_model_step: "c4c6e01aa1fc",
    BF16_Optimizer._setup_for_real_optimizer: "d5c428fde575",
    BF16_Optimizer.get_grads_for_norm: "81ed7f0b119f",
    BF16_Optimizer.step: "9b21d4a28f87",
    BF16_Optimizer.clear_hp_grads: "82cb16a0c5b9",
    TrainSchedule.steps: "2315b11ec9ed",
}


def digest(function: object) -> str:
    """First digits of the SHA-256 of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]  # type: ignore[arg-type]


@pytest.mark.parametrize("function", SOURCES, ids=lambda function: function.__qualname__)
def test_deepspeed_is_what_the_engine_was_written_against(function: object) -> None:
    assert digest(function) == SOURCES[function], f"DeepSpeed {deepspeed.__version__}: {function} has changed"  # type: ignore[index]


def test_the_pin_is_that_version() -> None:
    pins = (Path(__file__).parents[2] / "requirements" / "deepspeed.txt").read_text()
    assert f"deepspeed=={deepspeed.__version__}" in pins.split()
    assert deepspeed.__version__ == WRITTEN_AGAINST
    assert deepspeed.__version__ in (inspect.getdoc(inspect.getmodule(StageEngine)) or "")


@pytest.mark.parametrize(("lean", "stages", "schedule"), [(True, 2, SplitSchedule), (False, 2, TrainSchedule)])
def test_it_has_its_own_schedule_only_where_it_serves(lean: bool, stages: int, schedule: type) -> None:
    engine = StageEngine.__new__(StageEngine)
    torch.nn.Module.__init__(engine)
    engine._lean, engine.num_stages, engine.stage_id, engine.micro_batches = lean, stages, 0, 4
    assert type(engine._train_schedule()) is schedule


def optimizer_of(shard: int, shards: int, *groups: list[tuple[int, bool]]) -> SimpleNamespace:
    """A stand-in for DeepSpeed's optimizer with groups of (elements, whether it is a copy).

    The gradients of a group are 1, 2, 3 and so on, followed by two elements of padding.
    """
    found = SimpleNamespace(bf16_groups=[], fp32_groups_gradients_flat=[], fp32_groups_gradient_flat_partition=[])
    for group in groups:
        parameters = [torch.nn.Parameter(torch.zeros(size)) for size, _ in group]
        for parameter, (_, copied) in zip(parameters, group, strict=True):
            parameter.ds_pipe_replicated = copied
        flat = torch.arange(1.0, sum(size for size, _ in group) + 3)
        found.bf16_groups.append(parameters)
        found.fp32_groups_gradients_flat.append(flat)
        found.fp32_groups_gradient_flat_partition.append(flat.chunk(shards)[shard])
    return found


GROUPS: list[tuple[list[list[tuple[int, bool]]], list[float]]] = [
    ([[(4, False), (2, False)]], [1, 2, 3, 4, 5, 6]),
    ([[(3, True), (3, False)]], [4, 5, 6]),
    ([[(2, False), (4, True)], [(2, False)]], [1, 2, 1, 2]),
    ([[(2, False), (1, True), (3, False)]], [1, 2, 4, 5, 6]),
    ([[(2, True)], [(2, True)]], []),
]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(("groups", "counted"), GROUPS)
def test_each_gradient_counts_once_in_the_norm(groups: list, counted: list[float], shards: int) -> None:
    found = [_counted(optimizer_of(shard, shards, *groups)) for shard in range(shards)]
    assert all(found), "each rank has tensors for the norm, even if all are empty"
    assert sorted(torch.cat([torch.cat(parts) for parts in found]).tolist()) == sorted(counted)
