"""The decoder as DeepSpeed's `PipelineModule`, cut where the bounds say.

Between stages travel the hidden state and one small integer tensor: position ids and document boundaries of the
micro-batch. Each stage makes its attention from these once a micro-batch; no mask is ever sent.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from megazh.model.attention import Attend, Backend, Documents, Packed
from megazh.model.config import ModelConfig
from megazh.model.decoder import run_layers
from megazh.model.layers import Block, Embedding, Head, layer_count, make_layer
from megazh.model.loss import loss_and_gradient, summed_cross_entropy

_TIED = "embedding"


class _Layers:
    """Layers by their numbers; weights follow from seed and number, so that every layout begins with the same.

    Random numbers come one after the other from a generator, and each layer has its own: threads draw them at once.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._arguments = (config, seed)
        self._begun: dict[int, Future[nn.Module]] = {}

    def begin(self, numbers: Iterable[int]) -> None:
        """Start to make these."""
        pool = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0))))
        config, seed = self._arguments
        self._begun = {number: pool.submit(make_layer, config, number, seed) for number in numbers}
        pool.shutdown(wait=False)

    def take(self, number: int) -> nn.Module:
        """One that was begun."""
        return self._begun.pop(number).result()


class _Numbered(LayerSpec):
    """A layer by its number."""

    def __init__(self, layers: _Layers, number: int) -> None:
        super().__init__(nn.Module)
        self._layers, self._number = layers, number

    def build(self, log: bool = False) -> nn.Module:
        return self._layers.take(self._number)


class _Tied(TiedLayerSpec):
    """The embedding, once as itself and once as the head."""

    def __init__(self, layers: _Layers) -> None:
        super().__init__(_TIED, nn.Module)
        self._layers = layers

    def build(self, log: bool = False) -> nn.Module:
        return self._layers.take(0)


class DecoderPipeline(PipelineModule):
    """One stage of the decoder, as DeepSpeed drives it.

    Args:
        config: the model's shape.
        bounds: (stages + 1,) bounds over the parts embedding, blocks, head; see `split.best_bounds`.
        backend: how blocks are computed.
        seed: of the initial weights.
        activation_checkpointing: compute blocks a second time in the backward pass.
        z_loss: see `summed_cross_entropy`; only in training.
        graph: with fused blocks and one stage, launch the kernels of a micro-batch by one CUDA graph.
    """

    def __init__(
        self,
        config: ModelConfig,
        bounds: Sequence[int],
        backend: Backend,
        seed: int,
        activation_checkpointing: bool = False,
        z_loss: float = 0.0,
        graph: bool = True,
    ) -> None:
        self.config = config
        last = layer_count(config) - 1
        # The last norm belongs to the head: a bound behind a part is a bound behind its last layer.
        self._layer_bounds = [last + 1 if bound == last else bound for bound in bounds]
        self._layers = _Layers(config, seed)
        specs: list[LayerSpec] = [_Numbered(self._layers, number) for number in range(last + 1)]
        if config.tie_word_embeddings:
            specs[0] = specs[last] = _Tied(self._layers)
        super().__init__(specs, num_stages=len(bounds) - 1, loss_fn=self.scaled_loss, partition_method="uniform")
        self._documents, self.fused = Documents(config, backend), backend is Backend.FUSED
        self.recordable = self.fused and graph
        self.checkpointing, self._z_loss = activation_checkpointing, z_loss
        numbers = range(self._local_start, self._local_stop)
        self._embedding: Embedding | None = self.forward_funcs[0] if 0 in numbers else None
        self._blocks: list[Block] = [layer for layer in self.forward_funcs if isinstance(layer, Block)]
        self._head: Embedding | Head | None = self.forward_funcs[-1] if last in numbers else None
        self._norm: nn.Module | None = self.forward_funcs[-2] if last in numbers else None
        # DeepSpeed sums gradient norms over the stages once for each of the optimizer's groups: with matrices in one
        # and vectors in another, a stage without vectors (the embedding alone) would leave the others waiting for ever.
        if all(parameter.dim() > 1 for parameter in self.parameters()):
            self.placeholder = nn.Parameter(torch.zeros(1))

    def _partition_layers(self, method: str = "uniform") -> None:
        """Use our bounds; DeepSpeed's methods know neither FLOPs nor seconds."""
        self.parts = self._layer_bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])
        numbers = set(range(self._local_start, self._local_stop))
        last = self._layer_bounds[-1] - 1
        if self.config.tie_word_embeddings and last in numbers:
            numbers = numbers - {last} | {0}  # the largest first: it takes the longest
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
        """(vocab, hidden) of this stage's copy of the tied matrix, if it has one."""
        return self.tied_modules[_TIED].weight if _TIED in self.tied_modules else None

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """One micro-batch through this stage.

        Args:
            inputs: (batch, seq) int32 token ids, or (batch, seq, hidden) from the stage before; and the layout,
                (batch, seq + max_docs + 1) int32: position ids, then document boundaries.

        Returns:
            The pair for the next stage; from the last one (batch, seq, hidden) normed states and the head's weight.
        """
        states, layout = inputs
        seq_len = states.shape[1]
        attend = self._documents(layout[:, :seq_len], layout[:, seq_len:].contiguous(), self.training)
        hidden = self.run_layers(states, attend)
        if self._head is None:
            return hidden, layout
        # As an output of forward: DeepSpeed clears all gradients when the first one reaches an output, and that of
        # a weight which only the loss saw would have been summed by then, and be lost.
        return hidden, self._head.weight.view_as(self._head.weight)

    def run_layers(self, states: torch.Tensor, attend: Attend | Packed) -> torch.Tensor:
        """This stage's layers, with any attention."""
        checkpointing = self.checkpointing and self.training
        return run_layers(self._embedding, self._blocks, self._norm, states, attend, checkpointing)

    def scaled_loss(
        self, outputs: tuple[torch.Tensor, torch.Tensor], labels: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Summed cross entropy times a scale that makes DeepSpeed's mean of micro-batches and replicas right.

        Args:
            outputs: (batch, seq, hidden) normed states, and (vocab, hidden).
            labels: (batch, seq) int32, and the scale, one fp32.
        """
        (hidden, weight), (wanted, scale) = outputs, labels
        z_loss = self._z_loss if self.training else 0.0
        return summed_cross_entropy(hidden, weight, wanted, z_loss, self.fused) * scale.squeeze()

    def loss_and_gradient(
        self, hidden: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor], share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In training, what `scaled_loss` gives, and at once the gradients of `share` times it.

        The head's gradient is added to the `main_grad` of its matrix.

        Returns:
            A scalar in fp32, and the gradient of `hidden`.
        """
        assert self._head is not None
        wanted, scale = labels
        scale = scale.squeeze()
        summed, gradient = loss_and_gradient(hidden, self._head.weight, wanted, self._z_loss, scale * share, self.fused)
        return summed * scale, gradient

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden) normed states to (..., vocab) fp32, on the last stage."""
        assert self._head is not None
        return nn.functional.linear(hidden, self._head.weight).float()
