"""Hugging Face's Trainer, set up so that its steps are those of any other run of the recipe.

Samples, loss, decay by role and learning rate are the project's; the Trainer accumulates gradients, averages them over
the ranks (through DDP, or ZeRO of DeepSpeed), clips, and updates. It saves and loads nothing: its own checkpoints hold
pickles.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from megazh.index.mixture import Mixture
from megazh.pipeline.precision import Dtype, Precision
from megazh.pipeline.role import Role
from megazh.run.folder import RunFolder
from megazh.training.feed import MicroBatch, training_feed
from megazh.training.hf.deepspeed import zero_config
from megazh.training.hf.model import PackedModel
from megazh.training.layout import Layout
from megazh.training.recipe import Recipe


def trainer_arguments(
    run: RunFolder, recipe: Recipe, layout: Layout, precision: Precision, steps: int, cpu: bool
) -> transformers.TrainingArguments:
    """The Trainer's arguments.

    Args:
        run: the run's folder; the Trainer writes nothing there.
        recipe: the recipe.
        layout: the arrangement of its ranks.
        precision: the dtypes of the run.
        steps: optimizer steps that are still to be taken.
        cpu: whether ranks compute on the CPU.
    """
    optimizer = recipe.optimizer
    sharded = zero_config(recipe, layout, precision)
    return transformers.TrainingArguments(
        output_dir=str(run.path),
        per_device_train_batch_size=layout.micro_batch_size,
        gradient_accumulation_steps=layout.micro_batches,
        max_steps=max(steps, 1),  # 0 is refused; without samples none is taken
        learning_rate=optimizer.learning_rate,
        max_grad_norm=optimizer.max_grad_norm,
        # The model rounds by itself what DeepSpeed does not.
        bf16=sharded is not None and precision.compute is Dtype.BF16,
        deepspeed=sharded,
        use_cpu=cpu,
        seed=recipe.schedule.seed % (1 << 32),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
    )


class HfTrainer(transformers.Trainer):
    """Trains a `PackedModel` from step `first_step` on.

    Args:
        model: the model.
        arguments: see `trainer_arguments`.
        recipe: the recipe.
        layout: the arrangement of the ranks.
        mixture: the data.
        first_step: optimizer steps done before.
        callback: gets the Trainer's events; its `on_log` is called after each step.
        rate: learning rate of each step, counted from 0.
        watched: takes the micro-batches and yields them again; notes those that are taken.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: PackedModel,
        arguments: transformers.TrainingArguments,
        recipe: Recipe,
        layout: Layout,
        mixture: Mixture,
        first_step: int,
        callback: TrainerCallback,
        rate: Callable[[int], float],
        watched: Callable[[Iterator[MicroBatch]], Iterator[MicroBatch]],
    ) -> None:
        self._rate, self._watched = rate, watched
        self._recipe, self._layout, self._mixture, self._first_step = recipe, layout, mixture, first_step
        self._course = recipe.course
        self.data_seconds = 0.0
        """Seconds spent waiting for samples since it was set to 0."""
        # The loss function tells the Trainer that losses are scaled already: it divides them by nothing.
        super().__init__(model, arguments, callbacks=[callback], compute_loss_func=_as_it_is)
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> Any:
        """The micro-batches of this rank, in the order of every other run."""
        return _Batches(self._feed, self._wait)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This micro-batch's part of the step's mean over tokens, times the ranks: gradients are averaged over them."""
        loss: torch.Tensor = model(**inputs)
        return loss * self._layout.ranks

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with fp32 state, and weight decay by the roles of parameters."""
        if self.optimizer is None:
            config, packed = self._recipe.optimizer, self.model
            decayed: list[torch.Tensor] = []
            others: list[torch.Tensor] = []
            for tensor, parameter in packed.named_tensors():
                role = _role(tensor.parameter, parameter)
                (decayed if role in config.decayed else others).append(parameter)
            groups = [(decayed, config.weight_decay), (others, 0.0)]
            self.optimizer = torch.optim.AdamW(
                [{"params": params, "weight_decay": decay} for params, decay in groups if params],
                lr=1.0,  # which the scheduler multiplies by the rate of each step
                betas=(config.betas[0], config.betas[1]),
                eps=config.eps,
                fused=True,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate of each step."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(self.base_optimizer, lambda step: self._rate(self._first_step + step))
        return self.lr_scheduler

    def set_rate(self, rate: float) -> None:
        """Take the next step with another learning rate than the scheduler has set; later ones are the scheduler's."""
        for group in self.base_optimizer.param_groups:
            group["lr"] = rate

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer, under what accelerate and DeepSpeed wrap around it."""
        found: Any = self.optimizer
        while not isinstance(found, torch.optim.AdamW):
            found = found.optimizer
        return found

    def _feed(self) -> Iterator[MicroBatch]:
        layout, workers = self._layout, self._recipe.data.workers
        feed = training_feed(self._mixture, layout, dist.get_rank(), self._first_step, workers, self._course)
        return self._watched(feed)

    def _wait(self, seconds: float) -> None:
        self.data_seconds += seconds


class _Batches:
    """What the Trainer takes for its data loader."""

    def __init__(self, feed: Callable[[], Iterator[MicroBatch]], waited: Callable[[float], None]) -> None:
        self._feed, self._waited = feed, waited

    def __iter__(self) -> Iterator[dict[str, Any]]:
        feed = self._feed()
        while True:
            begun = time.perf_counter()
            batch = next(feed, None)
            self._waited(time.perf_counter() - begun)
            if batch is None:
                return
            (tokens, document_map), (targets, scale) = batch
            # No tensor: with DeepSpeed, the Trainer rounds tensors to bf16.
            yield {"tokens": tokens, "document_map": document_map, "targets": targets, "scale": float(scale)}


def _as_it_is(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs


def _role(name: str, parameter: torch.Tensor) -> Role:
    """Role of the parameter of a `Decoder` that a tensor belongs to; see `megazh.pipeline.parameters`."""
    layer = name.split(".")[0]
    if layer in ("embedding", "head"):
        return Role(layer)
    if "norm" in name:
        return Role.NORM
    return Role.MATRIX if parameter.dim() > 1 else Role.BIAS
