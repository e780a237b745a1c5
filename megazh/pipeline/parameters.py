"""The parameters of a stage: global names, which are the same in every layout, and their roles."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from megazh.model.layers import Block, Embedding, Head
from megazh.pipeline.role import Role


@dataclass(frozen=True, eq=False)
class NamedParameter:
    """A parameter of this rank's stage."""

    name: str
    """Global name, such as `blocks.3.mlp.up_proj.weight`; as in `megazh.model.decoder.Decoder`."""
    parameter: nn.Parameter
    role: Role
    is_copy: bool = False
    """Whether it is the last stage's copy of a tied embedding, which the first stage holds as well."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape without the rows that only pad a vocabulary."""
        shape = tuple(self.parameter.shape)
        return (getattr(self.parameter, "rows", shape[0]), *shape[1:]) if shape else shape

    @property
    def numel(self) -> int:
        """Number of elements, without padding rows. Those that pad come last."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def named_parameters(module: Any) -> list[NamedParameter]:
    """The parameters of a stage in the order of the model's layers, each once.

    Args:
        module: this rank's `DecoderPipeline`.
    """
    found: list[NamedParameter] = []
    seen: set[nn.Parameter] = set()
    last = module.config.num_hidden_layers
    for number, layer in enumerate(module.forward_funcs, module._local_start):
        head = number == last + 2
        prefix = (
            "embedding" if isinstance(layer, Embedding)
            else "head" if isinstance(layer, Head)
            else f"blocks.{number - 1}" if isinstance(layer, Block)
            else "norm"
        )  # fmt: skip
        for name, parameter in layer.named_parameters():
            if parameter in seen:
                continue
            seen.add(parameter)
            found.append(
                NamedParameter(f"{prefix}.{name}", parameter, _role(layer, name, parameter), head and prefix != "head")
            )
    return found


def _role(layer: nn.Module, name: str, parameter: nn.Parameter) -> Role:
    if isinstance(layer, Embedding):
        return Role.EMBEDDING
    if isinstance(layer, Head):
        return Role.HEAD
    if not isinstance(layer, Block) or "norm" in name:
        return Role.NORM
    return Role.MATRIX if parameter.dim() > 1 else Role.BIAS
