"""Loss of a model by the position of a token in its document."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megazh.errors import DataError
from megazh.model.decoder import Decoder
from megazh.progress import Progress

BOUNDS = (2048, 4096, 8192)
"""Usual ends of the ranges of positions."""
_CHUNK = 512  # positions whose logits are in memory at a time


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss of the tokens in a range of positions."""

    begin: int
    end: int
    """Positions from `begin` up to `end`, the first token of a document being 0; token 0 is never predicted."""
    tokens: int
    loss: float
    """Nats per token."""


def position_losses(
    model: Decoder, documents: Sequence[npt.NDArray[np.integer]], bounds: Sequence[int] = BOUNDS, batch_size: int = 1
) -> list[PositionLoss]:
    """Mean loss of tokens by their position, over documents that each fill all ranges; shows progress.

    Args:
        model: the model, in evaluation mode.
        documents: token ids of each, at least `bounds[-1]`; tokens behind that are not read.
        bounds: ends of the ranges, rising; the first range begins at 0.
        batch_size: documents that are computed together.

    Raises:
        DataError: a loss is not finite.
    """
    sums = np.zeros(len(bounds))
    with Progress("position loss", len(documents) * bounds[-1], unit="tok") as progress:
        for begin in range(0, len(documents), batch_size):
            batch = np.stack([each[: bounds[-1]].astype(np.int64) for each in documents[begin : begin + batch_size]])
            losses = _losses(model, torch.from_numpy(batch))
            sums += [losses[:, max(a - 1, 0) : b - 1].sum() for a, b in itertools.pairwise((0, *bounds))]
            progress.advance(batch.size)
    found = []
    for (begin, end), total in zip(itertools.pairwise((0, *bounds)), sums, strict=True):
        tokens = len(documents) * (end - max(begin, 1))
        if not math.isfinite(total):
            raise DataError(f"positions {begin:,} to {end:,}: the loss is not finite: the weights are of no use")
        found.append(PositionLoss(begin, end, tokens, float(total) / tokens))
    return found


@torch.no_grad()
def _losses(model: Decoder, tokens: torch.Tensor) -> npt.NDArray[np.float64]:
    """Loss of each token but the first, (batch, seq - 1), of whole documents (batch, seq)."""
    rows, length = tokens.shape
    tokens = tokens.to(model.head.weight.device)
    positions = torch.arange(length, dtype=torch.int32, device=tokens.device).expand(rows, length).contiguous()
    edges = torch.tensor([[0, length]], dtype=torch.int32, device=tokens.device).expand(rows, 2).contiguous()
    hidden = model(tokens, model.attention(positions, edges))
    found = []
    for begin in range(0, length - 1, _CHUNK):
        targets = tokens[:, begin + 1 : begin + 1 + _CHUNK]
        logits = model.logits(hidden[:, begin : begin + targets.shape[1]])
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        found.append(losses.view(targets.shape).double().cpu().numpy())
    return np.concatenate(found, 1)
