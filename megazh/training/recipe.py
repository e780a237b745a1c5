"""A recipe: everything that decides what a training run computes, from YAML files and `key=value` settings."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from megazh.config import Config, choice, from_mapping, override, read_layers
from megazh.errors import UsageError
from megazh.index.manifest import Amount
from megazh.index.packing import Packing
from megazh.model.config import Count, ModelConfig, Positive, Share

RECIPES = Path(__file__).resolve().parents[2] / "jobs" / "recipes"

Every = Annotated[int, Field(ge=0)]


class PrecisionChoice(StrEnum):
    """What weights and activations are held in."""

    AUTO = "auto"
    """bf16 on CUDA, fp32 on the CPU."""
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class GradientDtype(StrEnum):
    """What gradients are summed in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class StageCosts(StrEnum):
    """Where the costs come from that decide how layers are cut into stages."""

    AUTO = "auto"
    """Measured on CUDA; by FLOPs on the CPU, where a clock would make runs differ."""
    FLOPS = "flops"
    MEASURED = "measured"


class Kernels(StrEnum):
    """What blocks, head and loss are computed with on CUDA."""

    AUTO = "auto"
    """Triton's kernels, where the card, the model and a C compiler allow; the log says why not."""
    TORCH = "torch"
    """Plain torch: slower, for comparison and for machines on which Triton fails."""


class Resume(StrEnum):
    """What a run does where its folder already holds checkpoints."""

    AUTO = "auto"
    """Go on from the newest one; without any, begin."""
    NEVER = "never"
    """Refuse: this run is to be a new one."""


class DataConfig(Config):
    """`data:`."""

    manifest: str
    """The mixture, `data_index/NAME.yaml`, or the PREFIX of an index; relative to the current folder."""
    stories: Count | None = None
    """Where the manifest is missing, make it from so many made-up stories (the demo)."""
    packing: Annotated[Packing, choice(Packing)] = Packing.BEST_FIT
    max_docs: Annotated[int | None, Field(ge=2)] = None
    """Segments a sample; default seq_len / 8."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Threads that gather samples ahead."""


class Recipe(Config):
    """A training run."""

    model: ModelConfig
    data: DataConfig
    seq_len: Annotated[int, Field(ge=2)]
    """Tokens a sample."""

    micro_batch_size: Count
    """Samples that a GPU takes at a time."""
    global_batch_size: Count
    """Samples a step, over all GPUs; a multiple of micro_batch_size times the replicas."""
    gradient_accumulation_steps: Count | None = None
    """Micro-batches a step and replica; without it, what global_batch_size leaves."""
    tokens: Amount | None = None
    """Length of the run, such as 500M or 30B (or give `steps`)."""
    steps: Count | None = None

    pipe_parallel_size: Count = 1
    """Pipeline stages; the other GPUs are replicas."""
    gpus: Count | None = None
    """GPUs to take where the command does not say, fewer where there are fewer; default all. On the CPU: ranks."""
    stage_costs: Annotated[StageCosts, choice(StageCosts)] = StageCosts.AUTO
    stage_bounds: list[int] | None = None
    """The cut by hand: 0, the first part of each later stage, the number of parts. Parts: embedding, blocks, head."""
    memory_limit_gib: Positive | None = None
    """Memory a GPU that the cut must respect; default what the card has."""
    activation_checkpointing: bool = False
    """Compute each block a second time in the backward pass instead of keeping its activations."""

    kernels: Annotated[Kernels, choice(Kernels)] = Kernels.AUTO
    """Whether Triton's kernels serve on CUDA."""
    cuda_graph: bool = True
    """With Triton's kernels and one stage, launch all kernels of a micro-batch at once."""
    precision: Annotated[PrecisionChoice, choice(PrecisionChoice)] = PrecisionChoice.BF16
    grad_accum_dtype: Annotated[GradientDtype | None, choice(GradientDtype)] = None
    """Of the sum over micro-batches; default fp32, for fp16 fp16."""
    communication_dtype: Annotated[GradientDtype | None, choice(GradientDtype)] = None
    """Of the sum over replicas; default that of grad_accum_dtype."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """1 shares optimizer state out among replicas."""

    learning_rate: Positive
    """At its highest."""
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [0.9, 0.95])
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Of matrices; norms and biases have none."""
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """0 does not clip."""
    warmup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Steps of linear warm-up, or below 1 their share of the run."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where the cosine ends, relative to learning_rate."""
    z_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of the squared log-sum-exp in the training loss."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Of initial weights and dropout; the order of data is the mixture's."""

    resume: Annotated[Resume, choice(Resume)] = Resume.AUTO
    checkpoint_every: Every = 1000
    """Steps between checkpoints; 0: only at the end."""
    validate_every: Every = 1000
    """Steps between validations; 0: only at the end."""
    validation_samples: Count | None = None
    """Validate on so many samples at most; default all."""
    sample_every: Every = 0
    """Steps between sampled continuations; 0: only at the end."""
    sample_prompts: list[str] = Field(default_factory=lambda: ["从前，"])
    sample_tokens: Count = 64
    """Length of a sampled continuation."""
    check_tied_every: Every = 100
    """Steps between comparisons of the copies of a tied embedding."""
    peak_tflops: Positive | None = None
    """Peak of a GPU for MFU, where the table does not know it or you know better."""

    reference_days: Positive | None = None
    """How long such a run is known to take elsewhere, for `megazh plan` to compare with."""

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("give one of tokens and steps")
        if self.stage_bounds is not None:
            parts = self.model.num_hidden_layers + 2
            rising = all(a < b for a, b in zip(self.stage_bounds, self.stage_bounds[1:], strict=False))
            if len(self.stage_bounds) < 2 or self.stage_bounds[0] or self.stage_bounds[-1] != parts or not rising:
                raise ValueError(
                    f"stage_bounds {self.stage_bounds}: expected rising numbers from 0 to {parts} (embedding, "
                    f"{parts - 2} blocks, head)"
                )
        return self

    @property
    def batch_tokens(self) -> int:
        """Tokens a step."""
        return self.global_batch_size * self.seq_len

    @property
    def total_steps(self) -> int:
        """Steps of the run: the tokens asked for, rounded up to whole steps."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // self.batch_tokens)

    def to_yaml(self) -> str:
        """As a file that `load_recipe` reads back; what is left at its default (None) is not written."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def recipe_path(name: str) -> Path:
    """The file of a recipe, given by path or by the name of one in `jobs/recipes/`.

    Raises:
        UsageError: there is none; names those that there are.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    found = RECIPES / f"{name}.yaml"
    if not found.exists():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml") if not file.stem.startswith("_")))
        raise UsageError(f"recipe '{name}': not in {RECIPES}; give one of {known}, or the path of a .yaml file")
    return found


def load_recipe(path: Path | str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with `key=value` settings on top.

    `tokens` and `steps` replace each other, `global_batch_size` and `gradient_accumulation_steps` do not.

    Raises:
        UsageError: a key or value cannot work; one line that names it.
    """
    values: dict[str, Any] = read_layers(path, [("tokens", "steps")])
    for key, other in (("tokens", "steps"), ("steps", "tokens")):
        if any(setting.removeprefix("--").startswith(f"{key}=") for setting in settings):
            values.pop(other, None)
    return from_mapping(override(values, settings, Recipe), Recipe, str(path))
