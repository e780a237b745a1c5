"""DeepSpeed's pipeline engine for bf16 with fp32 accumulation, without work that costs time and changes no result.

Written against DeepSpeed 0.19.8; `tests/pipeline/test_stage_engine.py` fails where the source of what is replaced
differs.

| DeepSpeed | here |
|---|---|
| makes a bf16 gradient of each weight, copies it to fp32, adds it | the matrix product adds to the fp32 sum |
| copies inputs and received tensors, once or twice | uses them as they are |
| computes the loss, then its gradient through hooks | both at once; the head's gradient goes to its sum |
| reduces all gradients to every replica, through copies | reduce-scatters each replica's shard, in place |
| takes norm and clips over all weights, one by one | over a replica's shard, in a few long tensors |
| makes each stage wait for what it sends and receives | sends and receives while it computes (`transfer`) |
| makes the stage before wait for weight gradients | computes input gradients first (`schedule`) |
| copies batches to the GPU and waits | copies from pinned memory without waiting |
| launches each kernel of a micro-batch by itself | one CUDA graph, with one stage and fused blocks (`recorded`) |

Everything else (fp32 or fp16 weights, sums that are not fp32) runs on DeepSpeed's own paths.
"""

from collections import deque
from typing import Any, ClassVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from megazh.model.main_grad import Product, add_postponed
from megazh.pipeline.recorded import RecordedMicroBatch
from megazh.pipeline.schedule import ExpectActivation, ReceiveGradient, SplitSchedule, WeightPass
from megazh.pipeline.transfer import Tensors, Transfers
from megazh.pipeline.tuning import REDUCE_BUCKET_ELEMENTS


class _AllRanks:
    """Grid proxy that makes BF16_Optimizer reduce the squared norm over all ranks, since each holds its own shard."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def get_model_parallel_group(self) -> None:
        """None, which torch.distributed takes for all ranks."""


def _counted(optimizer: Any) -> list[torch.Tensor]:
    """Slices of this rank's gradient shard that count in the norm: all but those of copies of a tied weight."""
    found = []
    groups = (
        optimizer.bf16_groups,
        optimizer.fp32_groups_gradients_flat,
        optimizer.fp32_groups_gradient_flat_partition,
    )
    for parameters, flat, own in zip(*groups, strict=True):
        first = own.storage_offset() - flat.storage_offset()
        begin = end = 0
        pieces = []
        for parameter in parameters:
            if getattr(parameter, PIPE_REPLICATED, False):
                pieces.append((begin, end))
                begin = end + parameter.numel()
            end += parameter.numel()
        for piece in (*pieces, (begin, end)):
            low, high = max(piece[0], first), min(piece[1], first + len(own))
            found.append(flat[low : max(low, high)])
    return found


class StageEngine(PipelineEngine):
    """The engine of one rank: `train_batch` trains a step and `eval_batch` validates, as in its base class."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.total_loss: torch.Tensor | None
        self.total_additional_losses: dict[str, torch.Tensor] | None
        self.pipe_recv_buf: Tensors | None
        self.first_output_send: bool
        # Whether the right column of the table above holds: bf16 weights, fp32 sums.
        self._lean = self.using_bf16_optimizer and self.optimizer.grad_acc_dtype is torch.float32
        if not self._lean:
            return
        optimizer = self.optimizer
        self._counted = _counted(optimizer)
        optimizer.get_grads_for_norm, optimizer.mpu = self._gradients, _AllRanks(optimizer.mpu)
        # Deferred weight-gradient products of the running backward pass; `_weights` queues those of earlier ones.
        self._postponed: list[Product] = []
        self._weights: deque[list[Product]] = deque()
        self._records = self.module.recordable and self.device.type == "cuda"
        self._recorded: RecordedMicroBatch | None = None
        self._ran = False  # whether this process has trained a step, so that nothing is set up for the first time
        for parameters, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for parameter, flat in zip(parameters, sums, strict=True):
                parameter.main_grad = flat.view_as(parameter)
                parameter._hp_grad = flat  # where DeepSpeed looks for the gradient of a tied weight
        if self.num_stages > 1:
            self._transfers = Transfers(self.module.topology(), self.device)
            if not self.module.checkpointing:  # recomputed activations would have to be kept after all
                for parameter in self.module.parameters():
                    parameter.postponed = self._postponed

    def _gradients(self, for_clipping: bool = False) -> Any:
        """Gradients for the optimizer's norm and clipping: a few long tensors instead of one per weight."""
        return self.optimizer.fp32_groups_gradient_flat_partition if for_clipping else (self._counted, {})

    @property
    def _share(self) -> float:
        """Share of the step's gradient that one micro-batch contributes (a mean over micro-batches and replicas)."""
        return 1 / (self.micro_batches * self.grid.data_parallel_size)

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        if not self._lean:
            super()._exec_load_micro_batch(buffer_id)
            return
        inputs, labels = self._next_batch()
        if self._recorded is not None and self.module.training:
            self._recorded.load(inputs, labels)
            return
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = self._to_device(inputs)
        if self.is_last_stage():
            self.pipe_buffers["labels"][buffer_id] = self._to_device(labels)

    def _to_device(self, tensors: Tensors) -> Tensors:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def _exec_forward_pass(self, buffer_id: int) -> None:
        if not self._lean:
            super()._exec_forward_pass(buffer_id)
            return
        inputs = self.pipe_buffers["inputs"][buffer_id]
        if self.module.training and self._records and self._recorded is None and self._ran:
            self._recorded = RecordedMicroBatch(
                self.module, inputs, self.pipe_buffers["labels"][buffer_id], self._share
            )
        if self.module.training and self._recorded is not None:
            self._add_loss(self._recorded.replay())
            return
        outputs = self.module(inputs)
        self.pipe_buffers["outputs"][buffer_id] = outputs
        if not self.is_last_stage():
            return
        labels = self.pipe_buffers["labels"][buffer_id]
        if self.module.training:
            loss, gradient = self.module.loss_and_gradient(outputs[0], labels, self._share)
            self.pipe_buffers["output_tensors"][buffer_id] = gradient
        else:
            loss = self.module.loss_fn(outputs, labels)
        self._add_loss(loss.detach())

    def _add_loss(self, loss: torch.Tensor) -> None:
        self.loss = loss
        self.fwd_outputs.append(loss)
        self.total_loss = loss if self.total_loss is None else self.total_loss + loss
        if self.module.training and (parts := self.module.get_additional_losses()):
            totals = self.total_additional_losses or {}
            self.total_additional_losses = {name: totals.get(name, 0.0) + part for name, part in parts.items()}

    def _exec_backward_pass(self, buffer_id: int) -> None:
        if not self._lean:
            super()._exec_backward_pass(buffer_id)
            return
        if self._recorded is not None:
            return  # the graph ran forward and backward
        hidden = self.pipe_buffers["outputs"][buffer_id][0]
        gradient = self.pipe_buffers["output_tensors"][buffer_id] if self.is_last_stage() else self.grad_layer[0]
        torch.autograd.backward(hidden, gradient)
        for group in self.optimizer.bf16_groups:
            for parameter in group:
                if parameter.grad is not None:
                    parameter.main_grad.add_(parameter.grad)
                    parameter.grad = None
        if self.num_stages > 1:
            self._weights.append(self._postponed.copy())
            self._postponed.clear()
        self.pipe_buffers["output_tensors"][buffer_id] = None
        self.pipe_buffers["outputs"][buffer_id] = None
        self.pipe_buffers["labels"][buffer_id] = None

    def _exec_recv_activations(self, buffer_id: int) -> None:
        if not self._lean:
            super()._exec_recv_activations(buffer_id)
            return
        assert self._transfers.from_previous is not None
        if self.pipe_recv_buf is None:  # the first message holds the shapes
            self.pipe_recv_buf = self._recv_tensor_meta(self.prev_stage)
            self._grad_layer_buf.clear()  # filled by _recv_tensor_meta, not used here
        received = self._transfers.from_previous.receive(self.pipe_recv_buf)
        for tensor in received:
            tensor.requires_grad = tensor.is_floating_point()
        self.pipe_buffers["inputs"][buffer_id] = received

    def _exec_expect_activations(self) -> None:
        assert self._transfers.from_previous is not None
        assert self.pipe_recv_buf is not None
        self._transfers.from_previous.expect(self.pipe_recv_buf)

    def _exec_send_activations(self, buffer_id: int) -> None:
        if not self._lean:
            super()._exec_send_activations(buffer_id)
            return
        assert self._transfers.to_next is not None
        outputs = self.pipe_buffers["outputs"][buffer_id]
        if self.first_output_send:
            self.first_output_send = False
            self._send_tensor_meta(outputs, self.next_stage)
        self._transfers.to_next.send(outputs)

    def _exec_receive_gradient(self, buffer_id: int) -> None:
        assert self._transfers.from_next is not None
        hidden = self.pipe_buffers["outputs"][buffer_id][0]
        self.grad_layer = self._transfers.from_next.receive((hidden.detach(),))

    def _exec_send_grads(self, buffer_id: int) -> None:
        if not self._lean:
            super()._exec_send_grads(buffer_id)
            return
        assert self._transfers.to_previous is not None
        self._transfers.to_previous.send((self.pipe_buffers["inputs"][buffer_id][0].grad,))
        self.pipe_buffers["inputs"][buffer_id] = None

    def _take_model_step(self, lr_kwargs: Any) -> None:
        """Skip a step whose gradients are not finite, in all precisions, and leave it to the caller to give up."""
        optimizer: Any = self.optimizer
        scaler: Any = getattr(optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False
        if isinstance(self.optimizer, torch.optim.Optimizer):  # fp32 without ZeRO: DeepSpeed never looks
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            norms = torch.stack([gradient.norm() for gradient in gradients])
            optimizer.overflow = not bool(norms.isfinite().all())  # equal on all replicas, as gradients are
            if optimizer.overflow:
                optimizer.zero_grad(set_to_none=True)  # so that the optimizer finds nothing to do
        super()._take_model_step(lr_kwargs)

    def _exec_weight_pass(self) -> None:
        add_postponed(self._weights.popleft())

    def _exec_schedule(self, pipe_schedule: Any) -> None:
        super()._exec_schedule(pipe_schedule)
        if self._lean:
            self._ran = self._ran or self.module.training
            if self.num_stages > 1:
                self._transfers.finish()

    def _train_schedule(self) -> Any:
        if not self._lean or self.num_stages == 1:
            return super()._train_schedule()
        return SplitSchedule(self.micro_batches, self.num_stages, self.stage_id)

    def _bf16_reduce_grads(self) -> None:
        if not self._lean:
            super()._bf16_reduce_grads()
            return
        replicas = self.grid.data_parallel_size
        if replicas == 1:
            return
        group, dtype = self.grid.get_data_parallel_group(), self.communication_data_type
        optimizer = self.optimizer
        for flat, own in zip(
            optimizer.fp32_groups_gradients_flat, optimizer.fp32_groups_gradient_flat_partition, strict=True
        ):
            if dtype is flat.dtype:
                dist.reduce_scatter_tensor(own, flat, group=group)
                continue
            shards, bucket = flat.view(replicas, len(own)), REDUCE_BUCKET_ELEMENTS // replicas
            for columns, target in zip(shards.split(bucket, 1), own.split(bucket), strict=True):
                sent = columns.to(dtype).flatten()
                received = sent.new_empty(len(target))
                dist.reduce_scatter_tensor(received, sent, group=group)
                target.copy_(received)

    _INSTRUCTION_MAP: ClassVar[dict[Any, Any]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _exec_load_micro_batch,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.BackwardPass: _exec_backward_pass,
        schedule.RecvActivation: _exec_recv_activations,
        schedule.SendActivation: _exec_send_activations,
        schedule.SendGrad: _exec_send_grads,
        ExpectActivation: _exec_expect_activations,
        ReceiveGradient: _exec_receive_gradient,
        WeightPass: _exec_weight_pass,
    }


def initialize(module: Any, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> StageEngine:
    """Make the engine of this rank as `deepspeed.initialize` does for a pipeline.

    Args:
        module: a `DecoderPipeline`.
        optimizer: an optimizer over its parameters.
        settings: a DeepSpeed configuration.
    """
    grid = module.mpu()
    deepspeed.zero.partition_parameters.shutdown_init_context()
    engine = StageEngine(
        args=None,
        model=module,
        optimizer=optimizer,
        mpu=grid,
        config=settings,
        config_class=DeepSpeedConfig(settings, grid),
    )
    deepspeed.zero.partition_parameters.restore_init_context()
    engine._configure_python_gc()
    return engine
