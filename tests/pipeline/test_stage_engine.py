"""The engine replaces exactly the code of DeepSpeed that it was written against."""

import hashlib
import inspect
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import TrainSchedule

from megazh.pipeline.precision import WRITTEN_AGAINST
from megazh.pipeline.schedule import SplitSchedule
from megazh.pipeline.stage_engine import StageEngine

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
    PipelineEngine._exec_reduce_grads: "3620e2a941f0",
    PipelineEngine._exec_schedule: "f162568c9f2b",
    PipelineEngine._train_schedule: "8423c0c94dd2",
    PipelineEngine._aggregate_total_loss: "562a551f9875",
    PipelineEngine._recv_tensor_meta: "ab38845ae896",
    PipelineEngine.eval_batch: "439640583d69",
    PipelineEngine._reduce_outputs: "2fc5a5aabb8c",
    PipelineEngine._exec_optimizer_step: "6eb5218d55f5",
    DeepSpeedEngine._configure_optimizer: "dd82a70f2f92",
    DeepSpeedEngine._report_progress: "d901e71309a4",
    DeepSpeedEngine._take_model_step: "c4c6e01aa1fc",
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


@pytest.mark.parametrize("stages", [1, 2])
def test_every_number_of_stages_has_the_same_schedule(stages: int) -> None:
    engine = StageEngine.__new__(StageEngine)
    torch.nn.Module.__init__(engine)
    engine.num_stages, engine.stage_id, engine.micro_batches = stages, 0, 1
    engine._most_micro_batches = 4
    schedule = engine._train_schedule()
    assert type(schedule) is SplitSchedule
    assert schedule.num_pipe_buffers() == stages, "as many as the largest step needs"
