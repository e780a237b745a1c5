"""The decoder as DeepSpeed's `PipelineModule`, cut into stages at given bounds.

Between stages travel the hidden state and the document map (`megazh.model.document_map`), never a mask.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from megazh.model.attention import Attend, Documents, Packed
from megazh.model.config import ModelConfig
from megazh.model.decoder import run_layers
from megazh.model.document_map import decode_document_map, decode_sample_numbers
from megazh.model.dropout import Dropout
from megazh.model.embedding_noise import EmbeddingNoise
from megazh.model.layers import Block, Embedding, Head, layer_count, make_layer
from megazh.model.lora_config import LoraConfig
from megazh.model.loss import loss_and_gradient, summed_cross_entropy
from megazh.pipeline.work import Work

_TIED = "embedding"
Z_LOSS = "z_loss"
"""Name of the z-loss among the engine's `agg_additional_losses`."""


class _Layers:
    """Makes layers by number, with weights that depend on seed and number alone: the same in every layout.

    Each layer has a random generator of its own, so that threads can make several at once.
    """

    def __init__(self, config: ModelConfig, seed: int, lora: LoraConfig | None) -> None:
        self._arguments = (config, seed, lora)
        self._begun: dict[int, Future[nn.Module]] = {}

    def begin(self, numbers: Iterable[int]) -> None:
        """Start making these layers."""
        pool = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0))))
        config, seed, lora = self._arguments
        self._begun = {number: pool.submit(make_layer, config, number, seed, lora) for number in numbers}
        pool.shutdown(wait=False)

    def take(self, number: int) -> nn.Module:
        """Wait for a layer that was begun, and return it."""
        return self._begun.pop(number).result()


class _Numbered(LayerSpec):
    """A layer named by its number."""

    def __init__(self, layers: _Layers, number: int) -> None:
        super().__init__(nn.Module)
        self._layers, self._number = layers, number

    def build(self, log: bool = False) -> nn.Module:
        return self._layers.take(self._number)


class _Tied(TiedLayerSpec):
    """The embedding's matrix, which serves as embedding and as head."""

    def __init__(self, layers: _Layers) -> None:
        super().__init__(_TIED, nn.Module)
        self._layers = layers

    def build(self, log: bool = False) -> nn.Module:
        return self._layers.take(0)


class DecoderPipeline(PipelineModule):
    """One stage of the decoder, as DeepSpeed drives it.

    Args:
        work: the model's shape, its low-rank pairs, and what computes its blocks.
        bounds: (stages + 1,) bounds over the parts embedding, blocks, head; see `split.best_bounds`.
        seed: seed of the initial weights and of dropout.
        z_loss: weight of the z-loss in training; see `summed_cross_entropy`.
        cuda_graph: whether the kernels of a pass may be recorded as a CUDA graph; takes effect with fused blocks.
    """

    def __init__(
        self, work: Work, bounds: Sequence[int], seed: int, z_loss: float = 0.0, cuda_graph: bool = True
    ) -> None:
        config = work.model
        self.config, self._seed, self._lora = config, seed, work.lora
        last = layer_count(config) - 1
        # Layers are one more than parts, since the head comes with the last norm: only the final bound differs.
        self._layer_bounds = [last + 1 if bound == last else bound for bound in bounds]
        self._layers = _Layers(config, seed, work.lora)
        specs: list[LayerSpec] = [_Numbered(self._layers, number) for number in range(last + 1)]
        if config.tie_word_embeddings:
            specs[0] = specs[last] = _Tied(self._layers)
        super().__init__(specs, num_stages=len(bounds) - 1, loss_fn=self.scaled_loss, partition_method="uniform")
        self._documents, self.fused = Documents(config, work.backend), work.fused
        self._attention_group, self._neftune_alpha = work.attention_group, work.neftune_alpha
        self.recordable = work.recordable and cuda_graph
        self.checkpointing, self._z_loss = work.activation_checkpointing, z_loss
        self._last_z_loss = torch.zeros(())  # of the micro-batch that was trained last
        numbers = range(self._local_start, self._local_stop)
        self._embedding: Embedding | None = self.forward_funcs[0] if 0 in numbers else None
        self._blocks: list[Block] = [layer for layer in self.forward_funcs if isinstance(layer, Block)]
        self._head: Embedding | Head | None = self.forward_funcs[-1] if last in numbers else None
        self._norm: nn.Module | None = self.forward_funcs[-2] if last in numbers else None

    def _partition_layers(self, method: str = "uniform") -> None:
        """Use the given bounds: DeepSpeed's own methods know neither FLOPs nor seconds."""
        self.parts = self._layer_bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])
        numbers = set(range(self._local_start, self._local_stop))
        last = self._layer_bounds[-1] - 1
        if self.config.tie_word_embeddings and last in numbers:
            numbers = numbers - {last} | {0}  # the embedding first: it takes longest
        self._layers.begin(sorted(numbers))

    @property
    def is_first(self) -> bool:
        """Whether this stage takes token ids."""
        return self._embedding is not None

    @property
    def is_last(self) -> bool:
        """Whether this stage has the head."""
        return self._head is not None

    def tied_weight(self) -> torch.Tensor | None:
        """This stage's copy of the tied matrix, (padded_vocab_size, hidden); None where it has none."""
        return self.tied_modules[_TIED].weight if _TIED in self.tied_modules else None

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """One micro-batch through this stage.

        Args:
            inputs: (batch, seq) int32 token ids, or (batch, seq, hidden) from the stage before; and the document map,
                (batch, seq + segments + 3) int32.

        Returns:
            The pair for the next stage; from the last stage (batch, seq, hidden) normed states alone.
        """
        states, document_map = inputs
        position_ids, cu_seqlens = decode_document_map(document_map, states.shape[1])
        dropout, of_pairs = None, self._lora.dropout if self._lora else 0.0
        if self.training and (self.config.has_dropout or of_pairs):
            dropout = Dropout(self.config, self._seed, decode_sample_numbers(document_map), of_pairs)
        noise = None
        if self.training and self._neftune_alpha and self.is_first:
            noise = EmbeddingNoise(self._neftune_alpha, self._seed, decode_sample_numbers(document_map), cu_seqlens)
        group = self._attention_group if self.training else None
        hidden = self.run_layers(states, self._documents(position_ids, cu_seqlens, dropout, group), noise)
        if self._head is None:
            return hidden, document_map
        return (hidden,)

    def run_layers(
        self, states: torch.Tensor, attend: Attend | Packed, noise: EmbeddingNoise | None = None
    ) -> torch.Tensor:
        """Run this stage's layers with the given attention and noise."""
        checkpointing = self.checkpointing and self.training
        return run_layers(self._embedding, self._blocks, self._norm, states, attend, checkpointing, noise)

    def scaled_loss(self, outputs: tuple[torch.Tensor], labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Validation loss: summed cross entropy times a scale that makes the sum over micro-batches a mean over tokens.

        Args:
            outputs: (batch, seq, hidden) normed states.
            labels: (batch, seq) int32 labels, and the scale, (1,) fp32.
        """
        assert self._head is not None
        (hidden,), (wanted, scale) = outputs, labels
        total = summed_cross_entropy(hidden, self._head.weight, wanted, fused=self.fused, vocab=self.config.vocab_size)
        return total * scale.squeeze()

    def loss_and_gradient(
        self, hidden: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Training loss, scaled as in `scaled_loss` and with the z-loss, together with its gradients.

        The head's gradient is added to the `main_grad` of its matrix.

        Args:
            hidden: (batch, seq, hidden) normed states.
            labels: (batch, seq) int32 labels, and the scale, (1,) fp32.

        Returns:
            The loss, a scalar in fp32, and the gradient of `hidden`.
        """
        assert self._head is not None
        wanted, scale = labels
        scale = scale.squeeze()
        summed, gradient, z_summed = loss_and_gradient(
            hidden, self._head.weight, wanted, self._z_loss, scale, self.fused, self.config.vocab_size
        )
        self._last_z_loss = z_summed * scale
        return summed * scale, gradient

    def get_additional_losses(self) -> dict[str, torch.Tensor] | None:
        """The z-loss in the loss of the micro-batch that was trained last; None for a run without one.

        All stages name it, and only the last knows it.
        """
        return {Z_LOSS: self._last_z_loss} if self._z_loss else None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn (..., hidden) normed states into (..., vocab_size) fp32 logits, on the last stage."""
        assert self._head is not None
        return nn.functional.linear(hidden, self._head.weight)[..., : self.config.vocab_size].float()
