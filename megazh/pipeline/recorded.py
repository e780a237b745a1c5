"""The passes of a micro-batch as CUDA graphs: all kernels of a pass in one launch.

Without graphs the CPU launches each kernel by itself, which takes longer than the kernels where a micro-batch is small.
Between the passes lie the transfers to and from other stages. A stage has as many sets of graphs as it holds
micro-batches at a time, each with tensors of its own that the kernels read and write at every replay.
"""

from collections.abc import Callable
from typing import Any

import torch

from megazh.model.main_grad import Product, add_gradients, add_postponed
from megazh.pipeline.transfer import Tensors

Replay = Callable[[], None]


def record(passes: Callable[[], None], pool: Any) -> Replay:
    """Record the kernels that a function launches, without running them; returns the function that runs them.

    Call it only for what has run in this process: what is compiled or set up at its first use cannot be recorded.

    Args:
        passes: launches kernels on tensors whose places do not change.
        pool: memory for what the kernels allocate; shared by graphs that run one after the other.
    """
    graph = torch.cuda.CUDAGraph()
    # "thread_local": other threads (the loader, which pins memory, and NCCL's watchdog) may go on meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        passes()
    return graph.replay


def new_pool() -> Any:
    """Memory for the graphs of one micro-batch."""
    torch.cuda.empty_cache()  # a graph cannot use what earlier micro-batches left in the allocator
    return torch.cuda.graph_pool_handle()


class RecordedPasses:
    """Forward, backward and weight pass of one micro-batch at a time.

    Args:
        module: this rank's `DecoderPipeline`.
        inputs: inputs of a micro-batch that has run; they are copied.
        labels: its labels and loss scale, on the last stage; copied as well.
        postponed: the list to which products of the backward pass are deferred; see `megazh.model.main_grad`.
    """

    outputs: Tensors
    """Outputs of the forward pass."""
    loss: torch.Tensor
    """Loss of the micro-batch, a scalar; on the last stage."""
    additional_losses: dict[str, torch.Tensor] | None
    """Parts of the loss that are reported by themselves."""

    def __init__(self, module: Any, inputs: Tensors, labels: Tensors | None, postponed: list[Product]) -> None:
        self._module, self._postponed = module, postponed
        self._products: list[Product] = []
        self.inputs = tuple(tensor.detach().clone() for tensor in inputs)
        self.labels = None if labels is None else tuple(tensor.detach().clone() for tensor in labels)
        self._leaves = tuple(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in self.inputs)
        pool = new_pool()
        self.forward = record(self._forward, pool)
        if labels is None:
            self.gradient = torch.empty_like(self.outputs[0])
            """Where the gradient of the outputs must be before the backward pass."""
        # A first stage that is frozen as a whole launches no kernel, and torch warns of a graph without any.
        self.backward = record(self._backward, pool) if self.outputs[0].requires_grad else _nothing
        self.weights = record(self._weights, pool) if self._products else _nothing

    @property
    def input_gradient(self) -> torch.Tensor:
        """Gradient of the hidden states in the inputs, after the backward pass."""
        gradient = self._leaves[0].grad
        assert gradient is not None
        return gradient

    def _forward(self) -> None:
        self._leaves[0].grad = None
        self.outputs = self._module(self._leaves)
        if self.labels is not None:
            self.loss, self.gradient = self._module.loss_and_gradient(self.outputs[0], self.labels)
            self.additional_losses = self._module.get_additional_losses()

    def _backward(self) -> None:
        torch.autograd.backward(self.outputs[0], self.gradient)
        add_gradients(self._module.parameters())
        self._products = self._postponed.copy()
        self._postponed.clear()

    def _weights(self) -> None:
        add_postponed(self._products)


def _nothing() -> None:
    """A pass without any kernel."""
