"""Cost of each part of the model per micro-batch: measured seconds, or floating-point operations before any are known.

The parts of a model are what a stage may hold, in order: embedding, blocks, head (with the last norm and the loss).
"""

from typing import Literal

from megazh.config import Config
from megazh.model.counts import flops_per_token
from megazh.pipeline.work import Work


class LayerCosts(Config):
    """Forward plus backward pass of one micro-batch, by type of part."""

    unit: Literal["FLOPs", "seconds"]
    embedding: float
    block: float
    """Cost of one block."""
    head: float
    """Cost of the last norm, the head and the loss together."""

    def parts(self, blocks: int) -> list[float]:
        """(blocks + 2,) cost of each part, in order: embedding, blocks, head."""
        return [self.embedding, *[self.block] * blocks, self.head]

    def passes(self, begin: int, end: int, blocks: int, split: bool) -> tuple[float, float, float]:
        """Cost of the forward, backward and weight pass of a stage that holds parts `begin` up to `end`.

        A matrix takes part in three products of equal size: forward, input gradient, weight gradient; so each pass
        costs a third. The head's forward pass also computes its input gradient (`megazh.model.loss`) and costs two
        thirds.

        Args:
            begin: first part of the stage.
            end: the part behind its last.
            blocks: blocks of the model.
            split: whether weight gradients are a pass of their own; else they belong to the backward pass.
        """
        parts = self.parts(blocks)
        head = parts[-1] if end == len(parts) else 0.0
        body = sum(parts[begin:end]) - head
        forward, backward, weights = (body + 2 * head) / 3, body / 3, (body + head) / 3
        return (forward, backward, weights) if split else (forward, backward + weights, 0.0)


def costs_by_flops(work: Work) -> LayerCosts:
    """Costs in floating-point operations; with activation checkpointing a block's forward pass counts twice."""
    flops = flops_per_token(work.model, work.seq_len, work.attention_group)
    recomputed = 4 / 3 if work.activation_checkpointing else 1.0
    return LayerCosts(
        unit="FLOPs",
        embedding=flops.embedding * work.tokens,
        block=flops.block * recomputed * work.tokens,
        head=flops.head * work.tokens,
    )
