"""A recipe: everything that decides what a training run computes, from YAML files and `key=value` settings.

Each key is a field of one of the sections in `recipe_sections`, with its docstring; `megazh recipe show NAME` prints
them all. To add a key, add a field there and use it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import model_validator

from megazh.config import Config, all_errors, dotted_fields, from_mapping
from megazh.errors import Collector, UsageError
from megazh.model.config import ModelConfig
from megazh.model.counts import Flops, flops_per_token
from megazh.model.lora_config import LoraConfig, places
from megazh.run.changes import newest
from megazh.run.folder import RunFolder
from megazh.settings import COMMAND_LINE, Settings, override, read_layers
from megazh.training.course import Batches, Course, Lengths
from megazh.training.model_from import split_from, with_model
from megazh.training.recipe_files import recipes_folder
from megazh.training.recipe_sections import (
    MAY_CHANGE,
    AttentionConfig,
    AttentionPattern,
    BatchConfig,
    CheckpointConfig,
    ControlConfig,
    DataConfig,
    Device,
    EvaluationConfig,
    GuardConfig,
    Kernels,
    LoggingConfig,
    MuonConfig,
    NoiseConfig,
    OptimizerConfig,
    OptimizerName,
    ParallelConfig,
    PrecisionConfig,
    Resume,
    ScheduleConfig,
    Spike,
    StageCosts,
)

if TYPE_CHECKING:
    from megazh.index.mixture import Mixture

__all__ = [
    "ALTERNATIVES",
    "MAY_CHANGE",
    "Device",
    "GuardConfig",
    "Kernels",
    "MuonConfig",
    "OptimizerConfig",
    "OptimizerName",
    "Recipe",
    "Resume",
    "Spike",
    "StageCosts",
    "differing_keys",
    "keys",
    "load_recipe",
    "read_recipe",
    "run_recipe",
]


class Recipe(Config):
    """A training run, in sections."""

    model: ModelConfig
    """Shape of the model. `from: FOLDER` takes it from a Hugging Face folder, an imported folder or a run."""
    data: DataConfig
    """Training data."""
    batch: BatchConfig
    """Size of an optimizer step."""
    attention: AttentionConfig = AttentionConfig()
    """Attention in training. Validation, sampling and exported models always have full attention."""
    noise: NoiseConfig = NoiseConfig()
    """Noise in training. Validation and sampling have none."""
    optimizer: OptimizerConfig
    """The optimizer and the objective that it minimizes."""
    schedule: ScheduleConfig
    """Length of the run, learning rate over its steps, and seed."""
    parallel: ParallelConfig = ParallelConfig()
    """Work of the GPUs: how many there are, and what each of them computes."""
    precision: PrecisionConfig = PrecisionConfig()
    """Dtypes."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints and resume."""
    guard: GuardConfig = GuardConfig()
    """Reaction to spikes of the loss."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation and sampled continuations during training."""
    control: ControlConfig = ControlConfig()
    """When an attempt stops by itself."""
    logging: LoggingConfig = LoggingConfig()
    """Trackers, reference figures that logs and plans compare with, and what is logged besides."""
    lora: LoraConfig = LoraConfig()
    """LoRA on the weights of checkpoint.initial_checkpoint; without this section, all weights are trained."""

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.lora.rank and self.checkpoint.initial_checkpoint is None:
            raise ValueError(
                f"lora.rank={self.lora.rank}: low-rank pairs on random weights learn nothing; name trained weights "
                "with checkpoint.initial_checkpoint, or leave lora out"
            )
        if self.lora.rank:
            try:
                places(self.model, self.lora)
            except UsageError as error:
                raise ValueError(str(error)) from None
        if self.guard.spike is Spike.ROLLBACK and not self.checkpoint.checkpoint_every:
            raise ValueError(
                "guard.spike=rollback goes back to checkpoints, and checkpoint_every=0 saves none on the way; set "
                "checkpoint_every, or guard.spike=skip"
            )
        if (self.schedule.tokens is None) == (self.schedule.steps is None):
            raise ValueError("give one of schedule.tokens and schedule.steps")
        self._check_course()
        if self.attention_group is not None and self.model.kv_heads % 2:
            raise ValueError(
                f"attention.pattern=s2 halves the heads, and the model has num_key_value_heads={self.model.kv_heads}, "
                "an odd number; set attention.pattern=full"
            )
        bounds = self.parallel.stage_bounds
        if bounds is not None:
            parts = self.model.num_hidden_layers + 2
            rising = all(a < b for a, b in itertools.pairwise(bounds))
            if len(bounds) < 2 or bounds[0] or bounds[-1] != parts or not rising:
                raise ValueError(
                    f"stage_bounds {bounds}: expected rising numbers from 0 to {parts} (embedding, {parts - 2} blocks, "
                    "head)"
                )
        return self

    def _check_course(self) -> None:
        """Refuse batches and lengths that cannot work. Raises ValueError."""
        size, sizes = self.batch.global_batch_size, self.schedule.batch
        try:
            _ = self.course
        except UsageError as error:
            raise ValueError(str(error)) from None
        if sizes and sizes[0] != size:
            raise ValueError(
                f"schedule.batch begins with {sizes[0]} samples, and batch.global_batch_size is {size}; set "
                f"global_batch_size={sizes[0]}, or let schedule.batch begin with {{0: {size}, ...}}"
            )
        if sizes and len(set(sizes.values())) > 1 and self.batch.gradient_accumulation_steps is not None:
            raise ValueError(
                "schedule.batch has steps of several sizes, and gradient_accumulation_steps is one number; leave "
                "batch.gradient_accumulation_steps out"
            )

    @property
    def low_rank(self) -> LoraConfig | None:
        """LoRA; None where all weights are trained."""
        return self.lora if self.lora.rank else None

    @property
    def attention_group(self) -> int | None:
        """Tokens per group of shifted sparse attention; None where attention is full."""
        return self.attention.group_tokens if self.attention.pattern is AttentionPattern.S2 else None

    @property
    def flops_per_token(self) -> Flops:
        """Training operations per token."""
        return flops_per_token(self.model, self.batch.seq_len, self.attention_group, self.low_rank)

    @property
    def course(self) -> Course:
        """Batch, segment length and learning rate of each step.

        A length in tokens is rounded up to whole steps.
        """
        schedule, seq_len = self.schedule, self.batch.seq_len
        batches = Batches(schedule.batch or {0: self.batch.global_batch_size}, seq_len)
        return Course(
            steps=schedule.steps or batches.steps_for(schedule.tokens or 0),
            batches=batches,
            lengths=Lengths(schedule.length or {0: seq_len}, seq_len),
            kind=schedule.kind,
            peak=self.optimizer.learning_rate,
            warmup=schedule.warmup,
            decay=schedule.decay,
            min_ratio=schedule.min_lr_ratio,
            label_at_cut=schedule.label_at_cut,
        )

    def with_cut(self, bounds: list[int]) -> "Recipe":
        """This recipe with the cut into stages that its ranks agreed on."""
        return self.model_copy(update={"parallel": self.parallel.model_copy(update={"stage_bounds": bounds})})

    def value(self, key: str) -> Any:
        """The value of a dotted key, as JSON holds it."""
        section, _, name = key.partition(".")
        return self.model_dump(mode="json", include={section})[section][name]

    def replaced(self, values: Mapping[str, Any]) -> "Recipe":
        """This recipe with other values, as JSON holds them, by dotted key. Raises UsageError where one cannot work."""
        if not values:
            return self
        nested = self.model_dump(mode="json", exclude_none=True)
        for key, value in values.items():
            section, _, name = key.partition(".")
            nested[section][name] = value
        return from_mapping(nested, Recipe, "changed settings")

    def open_mixture(self) -> "Mixture":
        """Open the data of the run. Raises UsageError and DataError as `Mixture` does."""
        from megazh.index.mixture import Mixture

        shortest = min(self.schedule.length.values()) if self.schedule.length else None
        return Mixture(
            self.data.manifest, self.batch.seq_len, self.data.packing, self.data.max_docs, shortest_cut=shortest
        )

    def to_yaml(self) -> str:
        """Text of a file that `load_recipe` reads back; keys left at a default of None are left out."""
        values = self.model_dump(mode="json", exclude_none=True)
        for key in ("batch", "length"):
            if numbers := getattr(self.schedule, key):
                values["schedule"][key] = numbers  # JSON has no keys that are numbers
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


ALTERNATIVES = [("schedule.tokens", "schedule.steps")]
"""Pairs of keys of which a recipe needs one; a later layer that gives one drops the other."""


def read_recipe(path: Path | str, assignments: Sequence[str] = ()) -> tuple[Recipe, Settings]:
    """Read the recipe in a file with `key=value` settings on top, and the origin of each value.

    Raises:
        MegazhError: keys or values cannot work; a line for each that names the key and the place where it was written.
    """
    layers = read_layers(path, ALTERNATIVES, Recipe.model_fields, library=recipes_folder())
    folder, others = split_from(list(assignments))
    found, usable = Collector(), list[str]()
    for text in others:
        with found.collecting():
            override(Settings(), [text], Recipe)
            usable.append(text)
    settings = override(layers, usable, Recipe, ALTERNATIVES)
    if found.errors:  # of the others, what is wrong by itself, whatever those that cannot be read should have been
        for line in all_errors(settings.values, Recipe, str(path), settings.origins):
            if line.startswith(f"{COMMAND_LINE}: key "):
                found.add(UsageError(line))
        found.raise_all()
    settings = with_model(settings, folder)
    for line in all_errors(settings.values, Recipe, str(path), settings.origins):
        found.add(UsageError(line))
    found.raise_all()
    return from_mapping(settings.values, Recipe, str(path), settings.origins), settings


def load_recipe(path: Path | str, assignments: Sequence[str] = ()) -> Recipe:
    """Read a recipe as `read_recipe` does, without origins."""
    return read_recipe(path, assignments)[0]


def run_recipe(run: RunFolder) -> Recipe:
    """The recipe of a run, with the layout and cut that it ran in, and with what was changed while it ran.

    Raises:
        UsageError: the folder holds no run.
    """
    if not run.exists:
        raise UsageError(f"{run.path}: not the folder of a run: {run.config.name} is missing")
    return load_recipe(run.config).replaced(newest(run.changes()))


def differing_keys(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any, bool]]:
    """Keys whose values differ: (dotted key, old value, new value, whether it has a mark and may differ)."""
    for name, field in Recipe.model_fields.items():
        section: Any = field.annotation
        old, new = getattr(before, name), getattr(now, name)
        for key, inner in section.model_fields.items():
            if getattr(old, key) != getattr(new, key):
                marked = MAY_CHANGE in inner.metadata
                yield f"{name}.{key}", getattr(old, key), getattr(new, key), marked


def keys() -> Iterator[tuple[str, Any]]:
    """All keys of a recipe by dotted name, with their pydantic fields; sections come before their keys."""
    return dotted_fields(Recipe)
