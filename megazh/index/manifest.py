"""`data_index/NAME.yaml`: the indexes of a training run, their shares, and the documents kept for validation."""

from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from megazh.config import Config, choice, load_yaml, parse_amount


class OnExhausted(StrEnum):
    """What happens when all samples of a corpus have been drawn."""

    WRAP = "wrap"
    """The corpus begins a new epoch, in another order."""
    STOP = "stop"
    """The mixture ends."""


def _amount(value: object) -> object:
    if isinstance(value, float) and value.is_integer():  # 1e9
        return int(value)
    return parse_amount(value) if isinstance(value, str) else value


Amount = Annotated[int, BeforeValidator(_amount), Field(gt=0)]
WhenExhausted = Annotated[OnExhausted, choice(OnExhausted)]


class Validation(Config):
    """Validation split by the hash of a document's text: documents of equal text are always on the same side."""

    fraction: Annotated[float, Field(ge=0, lt=1)]
    """Share of documents to keep for validation, at least 0 and below 1."""
    salt: str | int = ""
    """Salt of the hash; another one chooses other documents."""


class CorpusEntry(Config):
    """One index of the mixture. It needs exactly one of `weight`, `tokens` and `epochs`."""

    name: Annotated[str, Field(min_length=1)]
    """Name of the corpus in reports and error messages; it also enters the random order."""
    prefix: Annotated[str, Field(min_length=1)]
    """PREFIX of the index, relative to the manifest's folder."""
    weight: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Share of samples, relative to the other weights."""
    tokens: Amount | None = None
    """Number of tokens to draw, such as 3B. The share of samples is this number over the sum of all corpora."""
    epochs: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Number of passes over the corpus. The share of samples is its tokens times this, over the sum of all corpora."""
    on_exhausted: WhenExhausted | None = None
    """Action when this corpus is exhausted. Default: the manifest's `on_exhausted`."""
    sha256: str | None = None
    """SHA-256 that PREFIX.bin must have (`megazh index inspect` prints it). Default: not checked."""

    @model_validator(mode="after")
    def _one_amount(self) -> "CorpusEntry":
        given = [key for key in ("weight", "tokens", "epochs") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"corpus '{self.name}': expected one of weight, tokens, epochs; found {given or 'none'}")
        return self


class Manifest(Config):
    """The contents of `data_index/NAME.yaml`."""

    seed: int = 0
    """Seed of all random orders."""
    validation: Validation | None = None
    """Validation split. Default: all documents are for training."""
    on_exhausted: WhenExhausted = OnExhausted.WRAP
    """Action when a corpus is exhausted, for corpora without their own `on_exhausted`."""
    corpora: Annotated[list[CorpusEntry], Field(min_length=1)]
    """Indexes to mix."""

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        names = [corpus.name for corpus in self.corpora]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"corpora: the name '{twice}' is given twice")
        if len({corpus.weight is None for corpus in self.corpora}) > 1:
            with_weight = next(corpus.name for corpus in self.corpora if corpus.weight is not None)
            without = next(corpus.name for corpus in self.corpora if corpus.weight is None)
            raise ValueError(
                f"corpora: '{with_weight}' has a weight and '{without}' an amount; give all of them weights, or all "
                "of them tokens or epochs"
            )
        return self


def load_manifest(path: Path | str) -> Manifest:
    """Read a manifest. Raises UsageError, as `load_yaml` does."""
    return load_yaml(path, Manifest)


def manifest_at(path: Path) -> Manifest:
    """The manifest at `path`, or, if `path` is the PREFIX of an index, a manifest with that index alone."""
    if path.suffix not in (".yaml", ".yml") and Path(f"{path}.idx").exists():
        return Manifest(corpora=[CorpusEntry(name=path.name, prefix=path.name, weight=1.0)])
    return load_manifest(path)


def exact(value: float | int) -> Fraction:
    """The decimal number as written: 0.3 is exactly three tenths."""
    return Fraction(str(value))
