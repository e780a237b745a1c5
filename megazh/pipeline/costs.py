"""What each kind of layer costs a micro-batch: seconds where they were measured, floating-point operations before."""

from typing import Literal

from megazh.config import Config
from megazh.model.config import ModelConfig
from megazh.model.counts import flops_per_token


class LayerCosts(Config):
    """Forward and backward of one micro-batch, by kind of layer; `head` is the last norm, the head and the loss."""

    unit: Literal["FLOPs", "seconds"]
    embedding: float
    block: float
    head: float

    def units(self, blocks: int) -> list[float]:
        """The cost of each thing that a stage may hold, in order: embedding, blocks, head."""
        return [self.embedding, *[self.block] * blocks, self.head]

    def passes(self, begin: int, end: int, blocks: int, split: bool) -> tuple[float, float, float]:
        """Forward, backward and weight pass of a stage that holds the units from `begin` up to `end`.

        Taken as a third each, since each is one product of three for every matrix; the head's gradient of inputs is
        taken in its forward pass. Without a split, gradients of weights belong to the backward pass.
        """
        units = self.units(blocks)
        head = units[-1] if end == len(units) else 0.0
        body = sum(units[begin:end]) - head
        forward, backward, weights = (body + 2 * head) / 3, body / 3, (body + head) / 3
        return (forward, backward, weights) if split else (forward, backward + weights, 0.0)


def costs_by_flops(config: ModelConfig, seq_len: int, micro_batch_size: int, checkpointing: bool) -> LayerCosts:
    """Costs by operations; with activation checkpointing a block's forward pass is run twice."""
    flops = flops_per_token(config, seq_len)
    tokens = seq_len * micro_batch_size
    again = 4 / 3 if checkpointing else 1.0
    return LayerCosts(
        unit="FLOPs",
        embedding=flops.embedding * tokens,
        block=flops.block * again * tokens,
        head=flops.head * tokens,
    )
