"""The folder of a run: its files, and enough in them to resume, and to use the model without the training data."""

from __future__ import annotations

import contextlib
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megazh.config import Config, from_mapping
from megazh.errors import DataError, UsageError, WriteError
from megazh.files import check_sha256, write_atomic
from megazh.index.metadata import TokenizerInfo
from megazh.tokenizer import Tokenizer, load_tokenizer
from megazh.tokenizer.tokenizer import rank_kind

if TYPE_CHECKING:
    from megazh.index.mixture import Mixture

CONFIG, DESCRIPTION = "config.yaml", "run.json"

ANOTHER_RUN = "give the same again, or another folder with -r"
"""Remedy for a run that is started again as something else."""


class CorpusInfo(Config):
    """An index that the run reads."""

    name: str
    prefix: str
    sha256: str
    """SHA-256 of PREFIX.bin."""
    tokens: int
    training_documents: int
    validation_documents: int


class RunInfo(Config):
    """The contents of `run.json`: what the run reads."""

    format_version: Literal[1] = 1
    run_id: str = ""
    """Identity of the run, made at its first start, which its checkpoints carry; empty before its next start in runs of
    versions that had none."""
    tokenizer: TokenizerInfo
    mixture: str
    """Path of the manifest."""
    mixture_seed: int
    corpora: list[CorpusInfo]


class RunFolder:
    """Paths and contents of a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.plot = path / "loss.png"
        self.lock = path / ".lock"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config.exists()

    def info(self) -> RunInfo:
        """Read `run.json`. Raises DataError where it is missing or damaged."""
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
        """Load the run's own copy of its tokenizer. Raises DataError where it is missing or has changed."""
        info = self.info().tokenizer
        path = self._tokenizer_path(info)
        if not path.exists():
            raise DataError(
                f"{path}: missing; it is the run's copy of its tokenizer: copy the tokenizer of its corpus there"
            )
        check_sha256(path, info.sha256)
        return load_tokenizer(path, info.eod, info.front_tokens, rank_kind(info.kind))

    def begin(self, config: str, mixture: Mixture) -> None:
        """Record what the run is made of; for a run that is resumed, check that its data is still the same.

        Args:
            config: text of `config.yaml`, the recipe with the layout that is about to run.
            mixture: the data.

        Raises:
            UsageError: the run was started with other data.
            WriteError: the folder cannot be written; of a new run, nothing is left in it.
        """
        info = run_info(mixture)
        if self.exists:
            self._check_data(info)
            before = self.info()
            if not before.run_id:
                self._describe(before.model_copy(update={"run_id": _new_id()}))
            self.record(config)
            return
        tokenizer = Path(f"{mixture.corpora[0].prefix}{info.tokenizer.file}").read_bytes()
        try:
            write_atomic(self._tokenizer_path(info.tokenizer), tokenizer)
            self._describe(info.model_copy(update={"run_id": _new_id()}))
            self.record(config)  # last: config.yaml marks the run as started
        except WriteError:
            for path in (self._tokenizer_path(info.tokenizer), self.path / DESCRIPTION):
                with contextlib.suppress(OSError):
                    path.unlink()
            raise

    def record(self, config: str) -> None:
        """Write `config.yaml` anew: on every start, and once the cut into stages is known."""
        write_atomic(self.config, config.encode())

    def _describe(self, info: RunInfo) -> None:
        write_atomic(self.path / DESCRIPTION, (info.model_dump_json(indent=1) + "\n").encode())

    def _tokenizer_path(self, info: TokenizerInfo) -> Path:
        return self.path / f"tokenizer{Path(info.file).suffix}"

    def _check_data(self, info: RunInfo) -> None:
        was = self.info()
        if was.tokenizer.fingerprint != info.tokenizer.fingerprint:
            raise UsageError(f"{self.path}: the run was begun with another tokenizer; {ANOTHER_RUN}")
        old_data = [(corpus.name, corpus.sha256, corpus.training_documents) for corpus in was.corpora]
        new_data = [(corpus.name, corpus.sha256, corpus.training_documents) for corpus in info.corpora]
        if (old_data, was.mixture_seed) != (new_data, info.mixture_seed):
            raise UsageError(
                f"{self.path}: the data of {info.mixture} is not what the run was begun with; {ANOTHER_RUN}"
            )


def _new_id() -> str:
    return uuid.uuid4().hex[:16]


def run_info(mixture: Mixture) -> RunInfo:
    """Describe the data of a run."""
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
