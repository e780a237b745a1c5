"""A micro-batch of a single stage as a CUDA graph: forward, loss and backward in one launch."""

from typing import Any

import torch

from megazh.pipeline.transfer import Tensors


class RecordedMicroBatch:
    """The recorded kernels of one training micro-batch, and the tensors that they read.

    Make it only after such a micro-batch has run in this process: what is compiled or set up at its first use cannot
    be recorded.

    Args:
        module: the only stage of the model.
        inputs: the tensors that the recorded kernels read; later micro-batches are copied into them.
        labels: the same for labels and loss scale.
    """

    def __init__(self, module: Any, inputs: Tensors, labels: Tensors) -> None:
        self._inputs, self._labels = inputs, labels
        # The graph has memory of its own and cannot use what earlier micro-batches left in the allocator.
        torch.cuda.empty_cache()
        self._graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads (the loader, which pins memory, and NCCL's watchdog) may go on meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            hidden = module(inputs)[0]
            self._loss, gradient = module.loss_and_gradient(hidden, labels)
            torch.autograd.backward(hidden, gradient)

    def load(self, inputs: Tensors, labels: Tensors) -> None:
        """Copy the next micro-batch to where the graph reads it."""
        for own, new in zip((*self._inputs, *self._labels), (*inputs, *labels), strict=True):
            own.copy_(new, non_blocking=True)

    def replay(self) -> torch.Tensor:
        """Run the recorded kernels; returns the loss, a scalar."""
        self._graph.replay()
        return self._loss.clone()
