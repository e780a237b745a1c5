"""DeepSpeed's pipeline engine without work that costs time and changes no result, around `ShardedOptimizer`.

Written against DeepSpeed 0.19.8; `tests/pipeline/test_stage_engine.py` fails where the source of what is replaced
differs.

| DeepSpeed | here |
|---|---|
| makes a gradient of each weight, copies it to fp32, adds it | the matrix product adds to the fp32 sum |
| copies inputs and received tensors, once or twice | uses them as they are |
| computes the loss, then its gradient through hooks | both at once; the head's gradient goes to its sum |
| takes means over micro-batches and replicas | sums; the labels' scale alone makes a mean over tokens of it |
| updates through one of four optimizers, by dtype | through `ShardedOptimizer` |
| reduces the loss after the update | before it, with the norm, so that a step can be refused |
| makes each stage wait for what it sends and receives | sends and receives while it computes (`transfer`) |
| makes the stage before wait for weight gradients | computes input gradients first (`schedule`) |
| copies batches to the GPU and waits | copies from pinned memory without waiting |
| launches each kernel of a micro-batch by itself | one CUDA graph per pass, with fused blocks (`recorded`) |
"""

from collections.abc import Callable
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from megazh.model.main_grad import Product, add_gradients, add_postponed
from megazh.pipeline.busy_clock import BusyClock
from megazh.pipeline.recorded import RecordedPasses
from megazh.pipeline.schedule import ExpectActivation, ReceiveGradient, SplitSchedule, WeightPass
from megazh.pipeline.sharded_optimizer import ShardedOptimizer, Totals
from megazh.pipeline.transfer import Tensors, Transfers


def _timed(run: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    """An instruction that computes, counted by the engine's clock."""

    def timed(engine: Any, buffer_id: int) -> None:
        engine.clock.start()
        run(engine, buffer_id)
        engine.clock.stop()

    return timed


class StageEngine(PipelineEngine):
    """The engine of one rank: `train_batch` trains a step and `eval_batch` validates, as in its base class."""

    optimizer: ShardedOptimizer

    def __init__(self, make_optimizer: Callable[[Any, Any], ShardedOptimizer], **settings: Any) -> None:
        """Build the engine.

        Args:
            make_optimizer: makes the optimizer of a stage, given the module and DeepSpeed's grid of ranks.
            settings: the arguments of the base class.
        """
        self._make_optimizer = make_optimizer
        super().__init__(**settings)
        self.total_loss: torch.Tensor | None
        self.total_additional_losses: dict[str, torch.Tensor] | None
        self.pipe_recv_buf: Tensors | None
        self.first_output_send: bool
        # Deferred weight-gradient products of the running backward pass; `_weights` has those of each buffer.
        self._postponed: list[Product] = []
        self._weights: dict[int, list[Product]] = {}
        self._records = self.module.recordable and self.device.type == "cuda"
        self._recorded: list[RecordedPasses] = []
        """Recorded passes by buffer, from this process's second step on."""
        self._example: tuple[Tensors, Tensors | None] | None = None
        """Inputs and labels of a micro-batch that has run, so that nothing is set up for the first time."""
        self._totals = Totals(0.0, (), 0.0)  # of the last step
        self.clock = BusyClock(self.device)
        """Times the passes of a step."""
        self._most_micro_batches = self.micro_batches  # of any step; `set_train_batch_size` changes those of the next
        if self.num_stages > 1:
            self._transfers = Transfers(self.module.topology(), self.device)
            if not self.module.checkpointing:  # recomputed activations would have to be kept after all
                for parameter in self.module.parameters():
                    if parameter.requires_grad:
                        parameter.postponed = self._postponed

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        """Make the optimizer, where DeepSpeed would wrap the client's in one of its own."""
        self.optimizer = self._make_optimizer(self.module, self.module.mpu())

    def _report_progress(self, step: int) -> None:
        """Print nothing: DeepSpeed would read the learning rate of an optimizer of torch."""

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        inputs, labels = self._next_batch()
        if recorded := self._recording(buffer_id):
            if self.is_first_stage():
                _copy(inputs, recorded.inputs)
            if recorded.labels is not None:
                _copy(labels, recorded.labels)
            return
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = self._to_device(inputs)
        if self.is_last_stage():
            self.pipe_buffers["labels"][buffer_id] = self._to_device(labels)

    def _to_device(self, tensors: Tensors) -> Tensors:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def _exec_forward_pass(self, buffer_id: int) -> None:
        if recorded := self._recording(buffer_id):
            recorded.forward()
            self.pipe_buffers["outputs"][buffer_id] = recorded.outputs
            if self.is_last_stage():
                self._add_loss(recorded.loss.clone(), recorded.additional_losses)
            return
        inputs, labels = self.pipe_buffers["inputs"][buffer_id], self.pipe_buffers["labels"][buffer_id]
        outputs = self.module(inputs)
        self.pipe_buffers["outputs"][buffer_id] = outputs
        if self.module.training and self._records and self._example is None:
            self._example = inputs, labels
        if not self.is_last_stage():
            return
        if self.module.training:
            loss, gradient = self.module.loss_and_gradient(outputs[0], labels)
            self.pipe_buffers["output_tensors"][buffer_id] = gradient
            self._add_loss(loss.detach(), self.module.get_additional_losses())
        else:
            self._add_loss(self.module.loss_fn(outputs, labels).detach(), None)

    def _add_loss(self, loss: torch.Tensor, parts: dict[str, torch.Tensor] | None) -> None:
        self.loss = loss
        self.fwd_outputs.append(loss)
        self.total_loss = loss if self.total_loss is None else self.total_loss + loss
        if parts:
            totals = self.total_additional_losses or {}
            self.total_additional_losses = {name: totals.get(name, 0.0) + part for name, part in parts.items()}

    def _exec_backward_pass(self, buffer_id: int) -> None:
        if recorded := self._recording(buffer_id):
            recorded.backward()
            return
        hidden = self.pipe_buffers["outputs"][buffer_id][0]
        gradient = self.pipe_buffers["output_tensors"][buffer_id] if self.is_last_stage() else self.grad_layer[0]
        if hidden.requires_grad:  # not on a first stage that is frozen as a whole
            torch.autograd.backward(hidden, gradient)
        add_gradients(self.module.parameters())
        self._weights[buffer_id] = self._postponed.copy()
        self._postponed.clear()
        self.pipe_buffers["output_tensors"][buffer_id] = None
        self.pipe_buffers["outputs"][buffer_id] = None
        self.pipe_buffers["labels"][buffer_id] = None

    def _exec_recv_activations(self, buffer_id: int) -> None:
        assert self._transfers.from_previous is not None
        if self.pipe_recv_buf is None:  # the first message holds the shapes
            self.pipe_recv_buf = self._recv_tensor_meta(self.prev_stage)
            self._grad_layer_buf.clear()  # filled by _recv_tensor_meta, not used here
        received = self._transfers.from_previous.receive(self._place_of_activations(buffer_id))
        if not self._recording(buffer_id):
            for tensor in received:
                tensor.requires_grad = tensor.is_floating_point()
        self.pipe_buffers["inputs"][buffer_id] = received

    def _exec_expect_activations(self, buffer_id: int) -> None:
        assert self._transfers.from_previous is not None
        self._transfers.from_previous.expect(self._place_of_activations(buffer_id))

    def _place_of_activations(self, buffer_id: int) -> Callable[[], Tensors]:
        """Makes the tensors that take what the stage before sends."""
        if recorded := self._recording(buffer_id):
            return lambda: recorded.inputs
        like = self.pipe_recv_buf
        assert like is not None
        return lambda: tuple(torch.empty_like(tensor) for tensor in like)

    def _exec_send_activations(self, buffer_id: int) -> None:
        assert self._transfers.to_next is not None
        outputs = self.pipe_buffers["outputs"][buffer_id]
        if self.first_output_send:
            self.first_output_send = False
            self._send_tensor_meta(outputs, self.next_stage)
        self._transfers.to_next.send(outputs)

    def _exec_receive_gradient(self, buffer_id: int) -> None:
        assert self._transfers.from_next is not None
        if recorded := self._recording(buffer_id):
            self._transfers.from_next.receive(lambda: (recorded.gradient,))
            return
        hidden = self.pipe_buffers["outputs"][buffer_id][0]
        self.grad_layer = self._transfers.from_next.receive(lambda: (torch.empty_like(hidden),))

    def _exec_send_grads(self, buffer_id: int) -> None:
        assert self._transfers.to_previous is not None
        recorded = self._recording(buffer_id)
        gradient = recorded.input_gradient if recorded else self.pipe_buffers["inputs"][buffer_id][0].grad
        self._transfers.to_previous.send((gradient,))
        self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_weight_pass(self, buffer_id: int) -> None:
        if recorded := self._recording(buffer_id):
            recorded.weights()
        else:
            add_postponed(self._weights.pop(buffer_id))

    def _exec_schedule(self, pipe_schedule: Any) -> None:
        if self.module.training and self._example is not None and not self._recorded:
            # Before anything of this step travels: recording waits for the GPU.
            self._recorded = [
                RecordedPasses(self.module, *self._example, self._postponed)
                for _ in range(pipe_schedule.num_pipe_buffers())
            ]
        super()._exec_schedule(pipe_schedule)
        if self.num_stages > 1:
            self._transfers.finish()

    def _recording(self, buffer_id: int) -> RecordedPasses | None:
        """The recorded passes of a buffer, in training; None where kernels are launched one by one."""
        return self._recorded[buffer_id] if self._recorded and self.module.training else None

    def _train_schedule(self) -> Any:
        return SplitSchedule(self.micro_batches, self.num_stages, self.stage_id, self._most_micro_batches)

    def _exec_reduce_grads(self) -> None:
        self.optimizer.reduce_gradients()

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        zero = torch.zeros((), device=self.device)
        names = self.module.get_additional_losses() or {}
        parts = self.total_additional_losses or {}
        loss = self.total_loss if self.is_last_stage() and self.total_loss is not None else zero
        additional = [parts.get(name, zero) if self.is_last_stage() else zero for name in names]
        self._totals = self.optimizer.totals(loss.float(), [part.float() for part in additional])
        if not self.optimizer.step(self._totals):
            self.skipped_steps += 1
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

    def _aggregate_total_loss(self) -> torch.Tensor:
        names = self.module.get_additional_losses()
        if names:
            self.agg_additional_losses = {
                name: torch.tensor(value) for name, value in zip(names, self._totals.additional, strict=True)
            }
        return torch.tensor(self._totals.loss)

    def get_global_grad_norm(self) -> float:
        """Norm of the last step's gradient, before clipping."""
        return self._totals.norm

    _INSTRUCTION_MAP: ClassVar[dict[Any, Any]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _exec_load_micro_batch,
        schedule.ForwardPass: _timed(_exec_forward_pass),
        schedule.BackwardPass: _timed(_exec_backward_pass),
        schedule.RecvActivation: _exec_recv_activations,
        schedule.SendActivation: _exec_send_activations,
        schedule.SendGrad: _exec_send_grads,
        schedule.ReduceGrads: _exec_reduce_grads,
        schedule.OptimizerStep: _exec_optimizer_step,
        ExpectActivation: _exec_expect_activations,
        ReceiveGradient: _exec_receive_gradient,
        WeightPass: _timed(_exec_weight_pass),
    }


def _copy(tensors: Tensors, places: Tensors) -> None:
    for tensor, place in zip(tensors, places, strict=True):
        place.copy_(tensor, non_blocking=True)


def initialize(
    module: Any, make_optimizer: Callable[[Any, Any], ShardedOptimizer], settings: dict[str, Any]
) -> StageEngine:
    """Make the engine of this rank as `deepspeed.initialize` does for a pipeline.

    Args:
        module: a `DecoderPipeline`.
        make_optimizer: makes the optimizer of a stage; see `StageEngine`.
        settings: a DeepSpeed configuration.
    """
    grid = module.mpu()
    deepspeed.zero.partition_parameters.shutdown_init_context()
    engine = StageEngine(
        make_optimizer,
        args=None,
        model=module,
        optimizer=_never_called,
        mpu=grid,
        config=settings,
        config_class=DeepSpeedConfig(settings, grid),
    )
    deepspeed.zero.partition_parameters.restore_init_context()
    return engine


def _never_called(parameters: Any) -> Any:
    """Tells DeepSpeed that there is an optimizer; `StageEngine._configure_optimizer` makes it."""
    raise AssertionError("DeepSpeed made an optimizer")
