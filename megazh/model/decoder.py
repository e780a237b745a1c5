"""The whole decoder in one process: used to generate text, and the reference that pipeline stages must reproduce."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megazh.model.attention import Attend, Documents, Packed
from megazh.model.backend import Backend, choose_backend
from megazh.model.config import ModelConfig
from megazh.model.dropout import Dropout
from megazh.model.embedding_noise import EmbeddingNoise
from megazh.model.fused import run_fused
from megazh.model.layers import Embedding, Head, layer_count, make_layer
from megazh.model.lora_config import LoraConfig
from megazh.model.loss import summed_cross_entropy


class Decoder(nn.Module):
    """Embedding, blocks, last norm and head."""

    def __init__(
        self,
        config: ModelConfig,
        seed: int | None = 0,
        activation_checkpointing: bool = False,
        attention_group: int | None = None,
        lora: LoraConfig | None = None,
    ) -> None:
        """Build the decoder.

        Args:
            config: shape of the model.
            seed: seed of the initial weights and of dropout; None leaves the weights on the meta device, to be loaded
                later, and such a model does not train with dropout.
            activation_checkpointing: in training, keep only the input of each block and recompute its activations in
                the backward pass.
            attention_group: in training, tokens per group of shifted sparse attention; None: full attention.
            lora: see `make_layer`.
        """
        super().__init__()
        self.config, self._seed, self._lora = config, seed, lora
        self._attention_group = attention_group
        self._checkpointing = activation_checkpointing
        last = layer_count(config) - 1
        self.embedding: Embedding = make_layer(config, 0, seed, lora)  # type: ignore[assignment]
        self.blocks = nn.ModuleList([make_layer(config, number, seed, lora) for number in range(1, last - 1)])
        self.norm = make_layer(config, last - 1, seed, lora)
        head = self.embedding if config.tie_word_embeddings else make_layer(config, last, seed, lora)
        self.head: Embedding | Head = head  # type: ignore[assignment]
        self._documents: tuple[Backend, Documents] | None = None

    def attention(
        self, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, sample_numbers: torch.Tensor | None = None
    ) -> Attend | Packed:
        """Prepare the attention of a packed micro-batch, and in training its dropout.

        Args:
            position_ids, cu_seqlens: see `Documents`.
            sample_numbers: see `Dropout`; needed to train a model with dropout.

        Returns:
            What `Documents` returns.

        Raises:
            ValueError: a model with dropout is trained without sample numbers or seed.
        """
        dropout, of_pairs = None, self._lora.dropout if self._lora else 0.0
        if self.training and (self.config.has_dropout or of_pairs):
            if sample_numbers is None or self._seed is None:
                raise ValueError("a model with dropout trains with a seed and numbered samples: pass sample_numbers")
            dropout = Dropout(self.config, self._seed, sample_numbers, of_pairs)
        backend = choose_backend(self.config, position_ids.device, self.embedding.weight.dtype, lora=self._lora)
        if self._documents is None or self._documents[0] is not backend:
            self._documents = (backend, Documents(self.config, backend))
        group = self._attention_group if self.training else None
        return self._documents[1](position_ids, cu_seqlens, dropout, group)

    def forward(
        self, tokens: torch.Tensor, attend: Attend | Packed, noise: EmbeddingNoise | None = None
    ) -> torch.Tensor:
        """Compute the hidden states after the last norm, (batch, seq, hidden), of token ids (batch, seq)."""
        checkpointing = self._checkpointing and self.training
        return run_layers(self.embedding, self.blocks, self.norm, tokens, attend, checkpointing, noise)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute fp32 logits (..., vocab) from hidden states (..., hidden) after the last norm."""
        return nn.functional.linear(hidden, self.head.weight)[..., : self.config.vocab_size].float()

    def loss(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        z_loss: float = 0.0,
        sample_numbers: torch.Tensor | None = None,
        noise: EmbeddingNoise | None = None,
    ) -> torch.Tensor:
        """Cross entropy summed over all labels that are not negative.

        Args:
            tokens, labels, position_ids: (batch, seq) integers.
            cu_seqlens: (batch, segments + 1) int32, boundaries of the segments of each row, padded with seq.
            z_loss: see `summed_cross_entropy`.
            sample_numbers: see `attention`.
            noise: noise on the embedded tokens.

        Returns:
            A scalar in fp32.
        """
        attend = self.attention(position_ids, cu_seqlens, sample_numbers)
        hidden, fused = self(tokens, attend, noise), isinstance(attend, Packed)
        return summed_cross_entropy(hidden, self.head.weight, labels, z_loss, fused, self.config.vocab_size)


def run_layers(
    embedding: Embedding | None,
    blocks: Iterable[nn.Module],
    norm: nn.Module | None,
    states: torch.Tensor,
    attend: Attend | Packed,
    checkpointing: bool,
    noise: EmbeddingNoise | None = None,
) -> torch.Tensor:
    """Run consecutive layers of the decoder.

    Args:
        embedding: the embedding, if the layers start with it.
        blocks: any number of blocks.
        norm: the last norm, if the layers end with it.
        states: (batch, seq) token ids with an embedding, else (batch, seq, hidden) hidden states.
        attend: attention of the micro-batch, made by `Documents`; a `Packed` selects fused blocks.
        checkpointing: keep only the input of each block and recompute its activations in the backward pass.
        noise: noise on the embedded tokens, if the layers start with the embedding.

    Returns:
        (batch, seq, hidden).
    """
    if isinstance(attend, Packed):
        return run_fused(embedding, blocks, norm, states, attend, checkpointing, noise)
    hidden = states if embedding is None else embedding(states, attend.dropout)
    if embedding is not None and noise is not None:
        hidden = noise(hidden)
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            # No block draws from the global generators, whose states need not be kept.
            hidden = checkpoint(block, hidden, attend, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = block(hidden, attend)
    return hidden if norm is None else norm(hidden)
