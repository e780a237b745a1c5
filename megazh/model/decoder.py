"""The whole decoder in one process: what a pipeline's stages together must equal, and what generates text."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megazh.model.attention import Attend, Backend, Documents, Packed, choose_backend
from megazh.model.config import ModelConfig
from megazh.model.fused import run_fused
from megazh.model.layers import Embedding, Head, layer_count, make_layer
from megazh.model.loss import summed_cross_entropy


class Decoder(nn.Module):
    """Embedding, blocks, norm and head.

    Args:
        config: the shape.
        seed: of the initial weights.
        activation_checkpointing: compute each block a second time in the backward pass instead of keeping its
            activations.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0, activation_checkpointing: bool = False) -> None:
        """`seed` None leaves the weights as they come, for weights that are loaded."""
        super().__init__()
        self.config = config
        self._checkpointing = activation_checkpointing
        last = layer_count(config) - 1
        self.embedding: Embedding = make_layer(config, 0, seed)  # type: ignore[assignment]
        self.blocks = nn.ModuleList([make_layer(config, number, seed) for number in range(1, last - 1)])
        self.norm = make_layer(config, last - 1, seed)
        head = self.embedding if config.tie_word_embeddings else make_layer(config, last, seed)
        self.head: Embedding | Head = head  # type: ignore[assignment]
        self._documents: tuple[Backend, Documents] | None = None

    def attention(self, position_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> Attend | Packed:
        """The attention of a packed micro-batch; see `Documents`."""
        backend = choose_backend(self.config, position_ids.device, self.embedding.weight.dtype)
        if self._documents is None or self._documents[0] is not backend:
            self._documents = (backend, Documents(self.config, backend))
        return self._documents[1](position_ids, cu_seqlens, self.training)

    def forward(self, tokens: torch.Tensor, attend: Attend | Packed) -> torch.Tensor:
        """(batch, seq) ids to (batch, seq, hidden) normed states, which the head turns into logits."""
        checkpointing = self._checkpointing and self.training
        return run_layers(self.embedding, self.blocks, self.norm, tokens, attend, checkpointing)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden) normed states to (..., vocab) logits in fp32."""
        return nn.functional.linear(hidden, self.head.weight).float()

    def loss(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        z_loss: float = 0.0,
    ) -> torch.Tensor:
        """Cross entropy summed over the labels that count: a scalar in fp32. Arguments as in `Sample`."""
        attend = self.attention(position_ids, cu_seqlens)
        return summed_cross_entropy(
            self(tokens, attend), self.head.weight, labels, z_loss, fused=isinstance(attend, Packed)
        )


def run_layers(
    embedding: Embedding | None,
    blocks: Iterable[nn.Module],
    norm: nn.Module | None,
    states: torch.Tensor,
    attend: Attend | Packed,
    checkpointing: bool,
) -> torch.Tensor:
    """Some layers of the decoder in a row: (batch, seq) ids or (batch, seq, hidden) to (batch, seq, hidden).

    Args:
        checkpointing: blocks are computed a second time in the backward pass, instead of keeping their activations.
    """
    if isinstance(attend, Packed):
        return run_fused(embedding, blocks, norm, states, attend, checkpointing)
    hidden = states if embedding is None else embedding(states)
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(block, hidden, attend, use_reentrant=False)
        else:
            hidden = block(hidden, attend)
    return hidden if norm is None else norm(hidden)
