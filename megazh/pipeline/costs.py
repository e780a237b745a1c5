"""Cost of each part of the model per micro-batch: measured seconds, or floating-point operations before any are known.

The parts of a model are what a stage may hold, in order: embedding, blocks, head (with the last norm and the loss).
"""

from typing import Literal

from megazh.config import Config
from megazh.model.counts import flops_per_token
from megazh.model.lora_config import pair_parameters, trains_head
from megazh.pipeline.work import Work


class LayerCosts(Config):
    """Forward plus backward pass of one micro-batch, by type of part."""

    unit: Literal["FLOPs", "seconds"]
    embedding: float
    block: float
    """Cost of one block."""
    head: float
    """Cost of the last norm, the head and the loss together."""
    block_weights: float = 1 / 3
    """Share of a block's cost that is gradients of weights."""
    head_weights: float = 1 / 3
    """Share of the head's cost that is gradients of weights."""

    def parts(self, blocks: int) -> list[float]:
        """(blocks + 2,) cost of each part, in order: embedding, blocks, head."""
        return [self.embedding, *[self.block] * blocks, self.head]

    def passes(self, begin: int, end: int, blocks: int, split: bool) -> tuple[float, float, float]:
        """Cost of the forward, backward and weight pass of a stage that holds parts `begin` up to `end`.

        A matrix takes part in products of equal size: forward, input gradient and, unless it is frozen, weight
        gradient. The head's forward pass also computes its input gradient (`megazh.model.loss`).

        Args:
            begin: first part of the stage.
            end: the part behind its last.
            blocks: blocks of the model.
            split: whether weight gradients are a pass of their own; else they belong to the backward pass.
        """
        parts = self.parts(blocks)
        head = parts[-1] if end == len(parts) else 0.0
        body = sum(parts[begin:end]) - head
        weights = body * self.block_weights + head * self.head_weights
        backward = body * (1 - self.block_weights) / 2
        forward = backward + head * (1 - self.head_weights)
        return (forward, backward, weights) if split else (forward, backward + weights, 0.0)


def costs_by_flops(work: Work) -> LayerCosts:
    """Costs in floating-point operations; with activation checkpointing a block's forward pass counts twice."""
    flops = flops_per_token(work.model, work.seq_len, work.attention_group, work.lora)
    block = flops.block + flops.block_forward * work.activation_checkpointing
    return LayerCosts(
        unit="FLOPs",
        embedding=flops.embedding * work.tokens,
        block=block * work.tokens,
        head=flops.head * work.tokens,
        **weight_shares(work),
    )


def weight_shares(work: Work) -> dict[str, float]:
    """Shares of the cost of block and head that are gradients of weights, by their names in `LayerCosts`."""
    if work.lora is None:
        return {}
    flops = flops_per_token(work.model, work.seq_len, work.attention_group, work.lora)
    return {
        "block_weights": 2.0 * pair_parameters(work.model, work.lora) / flops.block,
        "head_weights": 1 / 3 if trains_head(work.model, work.lora) else 0.0,
    }
