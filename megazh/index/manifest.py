"""`data_index/NAME.yaml`: which indexes a training run reads, in which shares, and what it keeps for validation."""

from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from megazh.config import Config, choice, load_yaml, parse_amount


class OnExhausted(StrEnum):
    """What happens when a corpus has given all its samples."""

    WRAP = "wrap"
    """It begins a new epoch, in another order."""
    STOP = "stop"
    """The mixture ends."""


def _amount(value: object) -> object:
    return parse_amount(value) if isinstance(value, str) else value


Amount = Annotated[int, BeforeValidator(_amount), Field(gt=0)]
WhenExhausted = Annotated[OnExhausted, choice(OnExhausted)]


class Validation(Config):
    """Which documents are kept for validation, by the hash of their text: the same text is always on one side."""

    fraction: Annotated[float, Field(ge=0, lt=1)]
    """Share of documents, at least 0 and below 1."""
    salt: str | int = ""
    """Another salt chooses other documents."""


class CorpusEntry(Config):
    """One index in the mixture; exactly one of `weight`, `tokens`, `epochs`."""

    name: Annotated[str, Field(min_length=1)]
    prefix: Annotated[str, Field(min_length=1)]
    """PREFIX of the index, relative to the manifest."""
    weight: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Share of samples, relative to the other weights."""
    tokens: Amount | None = None
    """Tokens to draw, such as 3B; the share is that of the sum."""
    epochs: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Passes over the corpus; the share is that of the sum of tokens."""
    on_exhausted: WhenExhausted | None = None
    """What happens when this corpus runs out; without it, what the manifest says."""
    sha256: str | None = None
    """Where given, the SHA-256 that PREFIX.bin must have (`megazh index inspect` prints it)."""

    @model_validator(mode="after")
    def _one_amount(self) -> "CorpusEntry":
        given = [key for key in ("weight", "tokens", "epochs") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"corpus '{self.name}': expected one of weight, tokens, epochs; found {given or 'none'}")
        return self


class Manifest(Config):
    """The contents of `data_index/NAME.yaml`."""

    seed: int = 0
    """Decides every random order."""
    validation: Validation | None = None
    """Without it, all documents are for training."""
    on_exhausted: WhenExhausted = OnExhausted.WRAP
    corpora: Annotated[list[CorpusEntry], Field(min_length=1)]

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
    """Read a manifest. Raises UsageError as `load_yaml` does."""
    return load_yaml(path, Manifest)


def exact(value: float | int) -> Fraction:
    """The decimal number that was written: 0.3 is three tenths."""
    return Fraction(str(value))
