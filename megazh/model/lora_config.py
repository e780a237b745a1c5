"""Settings of LoRA (arXiv 2106.09685), and which rows of which product each target is. Does not import torch."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from megazh.config import Config, choice
from megazh.errors import UsageError
from megazh.model.config import Mlp, ModelConfig, Positive, Share

PART = ".lora."
"""Part of the names of all parameters of low-rank pairs, such as `blocks.3.attention.qkv_proj.lora.q.a`."""


def trains_with_embedding(parameter: str) -> bool:
    """Whether `train_embed_norm` trains a parameter of a `Decoder`, such as `blocks.3.mlp_norm.weight`."""
    return parameter.startswith(("embedding.", "norm.")) or "_norm." in parameter


def trains_head(config: ModelConfig, lora: "LoraConfig") -> bool:
    """Whether the head is trained: as an embedding that is tied to it."""
    return lora.train_embed_norm and config.tie_word_embeddings


class Target(StrEnum):
    """Matrices of a block that may have a low-rank pair, named as in Hugging Face models, without `_proj`."""

    Q = "q"
    """Queries."""
    K = "k"
    """Keys."""
    V = "v"
    """Values."""
    O = "o"  # noqa: E741
    """Output of the attention."""
    GATE = "gate"
    """Gate of a SwiGLU."""
    UP = "up"
    """Up projection of the MLP."""
    DOWN = "down"
    """Down projection of the MLP."""


class LoraConfig(Config):
    """LoRA: the weights are frozen, and low-rank pairs beside them are trained. Without a rank, all weights are."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the pairs; 0: no pairs, all weights are trained."""
    alpha: Positive = 16.0
    """Scale of the pairs, times the rank: a pair adds alpha / rank times its product."""
    targets: list[Annotated[Target, choice(Target)]] = Field(
        default_factory=lambda: [Target.Q, Target.K, Target.V, Target.O]
    )
    """Matrices of each block that have a pair: q, k, v, o, gate, up, down."""
    dropout: Share = 0.0
    """Probability that an element of a pair's input is dropped in training. It has no kernel: blocks run without
    Triton then."""
    train_embed_norm: bool = False
    """Whether the embedding, with a head tied to it, and all norms are trained as well (LongLoRA, arXiv 2309.12307);
    new tokens such as those of a chat template need it."""

    @model_validator(mode="after")
    def _consistent(self) -> "LoraConfig":
        if not self.rank:
            given = [name for name in sorted(self.model_fields_set) if getattr(self, name) != _default(name)]
            if given:
                raise ValueError(f"{given[0]} has no effect without a rank; give lora.rank, such as 8")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError("targets: expected some of q, k, v, o, gate, up, down, each once")
        return self

    @property
    def scale(self) -> float:
        """Factor of the product of each pair: alpha / rank."""
        return self.alpha / self.rank


def _default(name: str) -> object:
    return LoraConfig.model_fields[name].get_default(call_default_factory=True)


@dataclass(frozen=True)
class Place:
    """Where a target's pair acts: on rows of one product of a block."""

    target: Target
    product: str
    """Name of the product in `Block`, such as `attention.qkv_proj`."""
    inputs: int
    """Columns of the product's matrix."""
    begin: int
    """First row of the product's matrix that belongs to the target."""
    end: int
    """Row behind the last."""


def places(config: ModelConfig, lora: LoraConfig) -> list[Place]:
    """The places of all pairs of one block, in the order of `Target`.

    Raises:
        UsageError: the model has no such matrix.
    """
    return [place for place in _all_places(config) if place.target in _checked(config, lora)]


def pair_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Number of parameters of all pairs of one block."""
    return sum(lora.rank * (place.inputs + place.end - place.begin) for place in places(config, lora))


def _checked(config: ModelConfig, lora: LoraConfig) -> list[Target]:
    if Target.GATE in lora.targets and config.mlp is not Mlp.SWIGLU:
        raise UsageError(f"lora.targets: gate: a model with mlp={config.mlp} has none; leave it out")
    return lora.targets


def _all_places(config: ModelConfig) -> list[Place]:
    hidden, inner, attended = config.hidden_size, config.intermediate_size, config.attention_width
    keys = config.kv_heads * config.head_size
    up = inner if config.mlp is Mlp.SWIGLU else 0  # rows of the gate come before those of `up`
    qkv, mlp = "attention.qkv_proj", "mlp.up_proj"
    found = [
        Place(Target.Q, qkv, hidden, 0, attended),
        Place(Target.K, qkv, hidden, attended, attended + keys),
        Place(Target.V, qkv, hidden, attended + keys, attended + 2 * keys),
        Place(Target.O, "attention.o_proj", attended, 0, hidden),
        Place(Target.UP, mlp, hidden, up, up + inner),
        Place(Target.DOWN, "mlp.down_proj", inner, 0, hidden),
    ]
    if up:
        found.insert(4, Place(Target.GATE, mlp, hidden, 0, inner))
    return found
