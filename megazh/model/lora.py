"""Low-rank pairs beside the products of a block (LoRA, arXiv 2106.09685): the weights stay, the pairs are trained.

A pair of rank r adds `scale * (x A^T) B^T` to the rows of a product `x W^T` that belong to its target. Projections that
a block merges in one product have a pair each, so that adapters convert from and to other programs' form.
"""

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from megazh.model.config import ModelConfig
from megazh.model.dropout import Dropout
from megazh.model.lora_config import PART, LoraConfig, Place, places, trains_with_embedding
from megazh.model.main_grad import product_gradient

if TYPE_CHECKING:
    from megazh.model.layers import Block


class Pair(nn.Module):
    """One low-rank pair: A is (rank, inputs), B is (end - begin, rank)."""

    def __init__(self, place: Place, lora: LoraConfig, block: int) -> None:
        super().__init__()
        self.begin, self.end = place.begin, place.end
        self._target, self._block, self._scale = place.target, block, lora.scale
        self.a = nn.Parameter(torch.empty(lora.rank, place.inputs))
        self.b = nn.Parameter(torch.empty(place.end - place.begin, lora.rank))

    def forward(self, inputs: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
        """What the pair adds to its rows: (..., inputs) to (..., end - begin)."""
        if dropout is not None:
            inputs = dropout.of_pair(inputs, self._target, self._block)
        return F.linear(F.linear(inputs, self.a), self.b) * self._scale

    def add_(self, out: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add to rows of a product in place, outside of autograd.

        Args:
            out: (tokens, rows of the product).
            inputs: (tokens, inputs), input of the product.
        """
        out[:, self.begin : self.end].addmm_(inputs @ self.a.T, self.b.T, alpha=self._scale)

    def backward_(
        self, grad_inputs: torch.Tensor, grad_out: torch.Tensor, inputs: torch.Tensor
    ) -> dict[torch.Tensor, torch.Tensor | None]:
        """Backward pass of `add_`: adds to `grad_inputs` (tokens, inputs) in place.

        Args:
            grad_inputs: gradient of the input so far.
            grad_out: (tokens, rows of the product), gradient of the product; the caller must not overwrite it.
            inputs: (tokens, inputs), likewise.

        Returns:
            The gradients of both matrices, as `product_gradient` returns them.
        """
        grad = grad_out[:, self.begin : self.end]
        grad_low = (grad @ self.b).mul_(self._scale)
        grad_inputs.addmm_(grad_low, self.a)
        low = (inputs @ self.a.T).mul_(self._scale)
        return {self.a: product_gradient(self.a, grad_low, inputs), self.b: product_gradient(self.b, grad, low)}


class Pairs(nn.ModuleDict):
    """The pairs of one product, by target."""

    @property
    def all(self) -> list[Pair]:
        """The pairs, in the order of their rows."""
        return list(self.values())  # type: ignore[arg-type]

    def forward(self, out: torch.Tensor, inputs: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
        """Add all pairs to the output of a product, (..., rows), given its input, (..., inputs)."""
        parts, at = [], 0
        for pair in self.all:
            parts += [out[..., at : pair.begin], out[..., pair.begin : pair.end] + pair(inputs, dropout)]
            at = pair.end
        return torch.cat([*parts, out[..., at:]], -1)


def add_pairs(block: "Block", config: ModelConfig, lora: LoraConfig, number: int, seed: int | None) -> None:
    """Give a block its pairs, with initial weights that depend on seed, block and target alone: the same in any layout.

    A is uniform in ±1 / sqrt(inputs), as in PEFT (`kaiming_uniform_` with a = sqrt(5)), and B is zero, so that the
    block computes what it did without them.

    Args:
        block: the block.
        config: shape of the model.
        lora: the settings.
        number: number of the block, from 0.
        seed: seed of the initial weights; None: the device is "meta", and there are none.

    Raises:
        UsageError: the model has no such target.
    """
    found: dict[str, dict[str, nn.Module]] = {}
    for place in places(config, lora):
        pair = Pair(place, lora, number)
        if seed is not None:
            digest = hashlib.sha256(f"megazh lora of seed {seed}: block {number}, {place.target}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            bound = place.inputs**-0.5
            with torch.no_grad():
                pair.a.uniform_(-bound, bound, generator=generator)
                pair.b.zero_()
        found.setdefault(place.product, {})[place.target] = pair
    for product, pairs in found.items():
        block.get_submodule(product).lora = Pairs(pairs)


def freeze(layer: nn.Module, lora: LoraConfig, layer_name: str) -> None:
    """Freeze what LoRA does not train.

    Args:
        layer: a layer of the decoder.
        lora: the settings.
        layer_name: name of the layer in `Decoder`: `embedding`, `blocks`, `norm` or `head`.
    """
    for name, parameter in layer.named_parameters():
        whole = lora.train_embed_norm and trains_with_embedding(f"{layer_name}.{name}")
        parameter.requires_grad_(PART in name or whole)
