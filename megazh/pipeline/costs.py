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
