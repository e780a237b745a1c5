"""The folder of a run: what it holds, so that it can be resumed, and used elsewhere without the data."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from megazh.config import Config, from_mapping
from megazh.errors import DataError, UsageError
from megazh.files import check_sha256, write_atomic
from megazh.index.metadata import TokenizerInfo
from megazh.index.mixture import Mixture
from megazh.tokenizer import Tokenizer, load_tokenizer
from megazh.training.recipe import Recipe, load_recipe

CONFIG, DESCRIPTION = "config.yaml", "run.json"

# Keys that may change between the lives of a run; all others decide what it computes.
_FREE = {
    "tokens", "steps", "learning_rate", "warmup", "min_lr_ratio", "weight_decay", "max_grad_norm", "gpus",
    "stage_costs", "stage_bounds", "memory_limit_gib", "resume", "checkpoint_every", "validate_every",
    "validation_samples", "sample_every", "sample_prompts", "sample_tokens", "check_tied_every", "peak_tflops",
    "pipe_parallel_size", "gradient_accumulation_steps", "micro_batch_size", "activation_checkpointing", "kernels",
    "cuda_graph", "reference_days",
    "data.manifest", "data.stories", "data.workers",  # what the manifest holds is compared by itself
}  # fmt: skip

_REMEDY = "give the same again, or another folder with -r"


class CorpusInfo(Config):
    """An index that the run reads."""

    name: str
    prefix: str
    sha256: str
    """Of PREFIX.bin."""
    tokens: int
    training_documents: int
    validation_documents: int


class RunInfo(Config):
    """The contents of `run.json`."""

    format_version: Literal[1] = 1
    tokenizer: TokenizerInfo
    mixture: str
    """The manifest that the run reads."""
    mixture_seed: int
    corpora: list[CorpusInfo]


class RunFolder:
    """Paths and contents of a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.plot = path / "loss.png"
        self.lock = path / ".lock"

    @property
    def exists(self) -> bool:
        """Whether a run has been begun here."""
        return (self.path / CONFIG).exists()

    def recipe(self) -> Recipe:
        """The run's recipe. Raises UsageError where there is none."""
        if not self.exists:
            raise UsageError(f"{self.path}: not the folder of a run: {CONFIG} is missing")
        return load_recipe(self.path / CONFIG)

    def info(self) -> RunInfo:
        """What the run was begun with. Raises DataError where it is missing or damaged."""
        path = self.path / DESCRIPTION
        try:
            values = json.loads(path.read_bytes())
            if not isinstance(values, dict):
                raise ValueError("not an object")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: missing or damaged: {error}") from None
        try:
            return from_mapping(values, RunInfo, str(path))
        except UsageError as error:
            raise DataError(str(error)) from None

    def tokenizer(self) -> Tokenizer:
        """The run's own copy of its tokenizer. Raises DataError where it has changed."""
        info = self.info().tokenizer
        path = self.path / f"tokenizer{_suffix(info)}"
        if not path.exists():
            raise DataError(f"{path}: missing; it is the run's copy of its tokenizer")
        check_sha256(path, info.sha256)
        return load_tokenizer(path, info.eod, info.front_tokens)

    def begin(self, recipe: Recipe, mixture: Mixture) -> None:
        """Write down what the run is made of, or check that a run that goes on is still made of the same.

        Raises:
            UsageError: the run was begun with another model, data or seed; names the key and both values.
        """
        info = _describe(mixture)
        if self.exists:
            self.check_recipe(recipe)
            self._check_data(info)
        else:
            first = mixture.corpora[0]
            self.path.mkdir(parents=True, exist_ok=True)
            copy = self.path / f"tokenizer{_suffix(info.tokenizer)}"
            shutil.copyfile(f"{first.prefix}{info.tokenizer.file}", copy)
            write_atomic(self.path / DESCRIPTION, (info.model_dump_json(indent=1) + "\n").encode())
        # Last, and on every start: with it, the run counts as begun.
        write_atomic(self.path / CONFIG, recipe.to_yaml().encode())

    def check_recipe(self, recipe: Recipe) -> None:
        """Raises UsageError where the run was begun with another model or seed; names the key and both values."""
        before, now = self.recipe().model_dump(mode="json"), recipe.model_dump(mode="json")
        for key, (old, new) in _differences(before, now):
            if key not in _FREE:
                raise UsageError(f"{self.path}: the run was begun with {key}={old}, and this one has {new}; {_REMEDY}")

    def _check_data(self, info: RunInfo) -> None:
        was, remedy = self.info(), _REMEDY
        if was.tokenizer.fingerprint != info.tokenizer.fingerprint:
            raise UsageError(f"{self.path}: the run was begun with another tokenizer; {remedy}")
        old_data = [(corpus.name, corpus.sha256, corpus.training_documents) for corpus in was.corpora]
        new_data = [(corpus.name, corpus.sha256, corpus.training_documents) for corpus in info.corpora]
        if (old_data, was.mixture_seed) != (new_data, info.mixture_seed):
            raise UsageError(f"{self.path}: the data of {info.mixture} is not what the run was begun with; {remedy}")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Keys, as in `model.hidden_size`, whose values differ, with both."""
    for key, old in before.items():
        new = now[key]
        if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
            yield from ((f"{key}.{inner}", pair) for inner, pair in _differences(old, new))
        elif old != new:
            yield key, (old, new)


def _suffix(info: TokenizerInfo) -> str:
    """`.json` of `.tokenizer.json`."""
    return Path(info.file).suffix


def _describe(mixture: Mixture) -> RunInfo:
    corpora = [
        CorpusInfo(
            name=corpus.entry.name,
            prefix=str(corpus.prefix),
            sha256=corpus.metadata.files.bin.sha256,
            tokens=corpus.metadata.tokens,
            training_documents=len(corpus.training),
            validation_documents=len(corpus.validation),
        )
        for corpus in mixture.corpora
    ]
    return RunInfo(
        tokenizer=mixture.corpora[0].metadata.tokenizer,
        mixture=str(mixture.path),
        mixture_seed=mixture.seed,
        corpora=corpora,
    )
