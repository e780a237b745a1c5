"""The folder of a run: its files, and enough in them to resume, and to use the model without the training data."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megazh.config import Config, from_mapping
from megazh.errors import DataError, UsageError, WriteError
from megazh.files import check_sha256, write_atomic
from megazh.index.fingerprint import describe_differences, differences, renamed_corpora
from megazh.index.metadata import TokenizerInfo
from megazh.run.attempt import KILLED, Attempt, this_attempt
from megazh.run.changes import Change, Value, without
from megazh.run.redraw import PLOT
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
    """The contents of `run.json`: what the run reads, and its attempts."""

    format_version: Literal[1] = 1
    run_id: str = ""
    """Identity of the run, made at its first start, which its checkpoints carry; empty before its next start in runs of
    versions that had none."""
    tokenizer: TokenizerInfo
    mixture: str
    """Path of the manifest."""
    mixture_seed: int
    corpora: list[CorpusInfo]
    data: dict[str, str] | None = None
    """Fingerprint of the mixture (see `megazh.index.fingerprint`); None in runs of versions that recorded none."""
    engine: str = "ds_pp"
    """Engine of the run, as `megazh pretrain -t` names it."""
    attempts: list[Attempt] = Field(default_factory=list)
    """Starts of the run, oldest first; those of versions that recorded none are missing."""
    changes: list[Change] = Field(default_factory=list)
    """Settings that were changed while it ran, oldest first; `config.yaml` holds the values of its last start."""


class RunFolder:
    """Paths and contents of a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.plot = path / PLOT
        self.lock = path / ".lock"
        self.control = path / "control"

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

    def begin(
        self,
        config: str,
        mixture: Mixture,
        saved: Mapping[str, str] | None = None,
        allow_change: bool = False,
        engine: str = "ds_pp",
        given: Mapping[str, Value] | None = None,
        steps: int = 0,
    ) -> list[str]:
        """Record an attempt and what the run is made of; for a resume, check first that the data is still the same.

        Args:
            config: text of `config.yaml`, the recipe with the layout that is about to run.
            mixture: the data.
            saved: see `check_data`.
            allow_change: see `check_data`.
            engine: the engine, as `megazh pretrain -t` names it.
            given: settings of the command line, see `given_anew`: what was changed of those keys before is forgotten.
            steps: optimizer steps that are done already.

        Returns:
            Lines to print; see `check_data`.

        Raises:
            UsageError: the run was started with other data.
            WriteError: the folder cannot be written; of a new run, nothing is left in it.
        """
        info, given = run_info(mixture).model_copy(update={"engine": engine}), given or {}
        if self.exists:
            notes, before = self.check_data(mixture, saved, allow_change), self.info()
            attempts, run_id = [*_settled(before.attempts), this_attempt(given, steps)], before.run_id or _new_id()
            changes = without(before.changes, self.given_anew(given))
            self._describe(info.model_copy(update={"attempts": attempts, "run_id": run_id, "changes": changes}))
            self.record(config)
            return notes
        tokenizer = Path(f"{mixture.corpora[0].prefix}{info.tokenizer.file}").read_bytes()
        try:
            write_atomic(self._tokenizer_path(info.tokenizer), tokenizer)
            self._describe(info.model_copy(update={"attempts": [this_attempt(given, steps)], "run_id": _new_id()}))
            self.record(config)  # last: config.yaml marks the run as started
        except WriteError:
            for path in (self._tokenizer_path(info.tokenizer), self.path / DESCRIPTION):
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
        return []

    def add_devices(self, devices: list[str], versions: Mapping[str, str]) -> None:
        """Complete the newest attempt by what only its ranks know: their devices, and versions of more libraries."""
        info = self.info()
        if info.attempts:
            newest = info.attempts[-1]
            update = {"devices": devices, "versions": {**newest.versions, **versions}}
            self._describe(
                info.model_copy(update={"attempts": [*info.attempts[:-1], newest.model_copy(update=update)]})
            )

    def changes(self) -> list[Change]:
        """Settings that were changed while the run ran, oldest first; none before the run has begun."""
        return self.info().changes if (self.path / DESCRIPTION).exists() else []

    def given_anew(self, given: Mapping[str, Value]) -> set[str]:
        """The keys of settings of the command line that win over changes: those that the command line of the last start
        did not give with the same value. A command that a scheduler repeats so takes back nothing.

        Args:
            given: value by dotted key.
        """
        attempts = self.info().attempts if (self.path / DESCRIPTION).exists() else []
        last = attempts[-1].given if attempts else {}
        return {key for key, value in given.items() if key not in last or last[key] != value}

    def set_changes(self, changes: list[Change]) -> None:
        """Record the settings that were changed while the run ran, all of them. Raises WriteError."""
        self._describe(self.info().model_copy(update={"changes": changes}))

    def end(self, code: int, reason: str) -> None:
        """Record the end of the newest attempt, where there is a run.

        A folder that cannot be written changes no exit code: a warning says so.

        Args:
            code: exit code of the run.
            reason: why it ended.
        """
        if not self.exists:
            return
        try:
            info = self.info()
            if info.attempts:
                attempts = [*info.attempts[:-1], info.attempts[-1].ended_now(code, reason, self._saved())]
                self._describe(info.model_copy(update={"attempts": attempts}))
        except (DataError, WriteError) as error:
            print(f"warning: the end of this attempt is not recorded: {error}", file=sys.stderr, flush=True)

    def _saved(self) -> int | None:
        """Step of the newest checkpoint, by its name; None without one."""
        names = [path.name for path in self.checkpoints.glob("step_*")]
        return max((int(name[5:]) for name in names if re.fullmatch(r"step_[0-9]{8}", name)), default=None)

    def check_data(
        self, mixture: Mixture, saved: Mapping[str, str] | None = None, allow_change: bool = False
    ) -> list[str]:
        """Check that a mixture gives the samples that the run was begun with.

        Paths may differ; see `megazh.index.fingerprint` for what counts.

        Args:
            mixture: the data that the run is about to go on with.
            saved: fingerprint in the manifest of the checkpoint that is resumed from, where there is one.
            allow_change: whether other data than before is taken.

        Returns:
            Lines to print: what has changed, or what cannot be checked, for a run of a version that recorded less.

        Raises:
            UsageError: the data differs; names the parts with both values.
        """
        was, info = self.info(), run_info(mixture)
        if was.tokenizer.fingerprint != info.tokenizer.fingerprint:
            raise UsageError(f"{self.path}: the run was begun with another tokenizer; {ANOTHER_RUN}")
        for recorded in (was.data, saved):
            if recorded is not None and (found := differences(recorded, mixture.fingerprint)):
                if not allow_change:
                    raise UsageError(self._differs(info, found))
                return [
                    f"{self.path}: the data has changed, as data.allow_change=true allows:",
                    *(f"  {name:<32} {before} -> {now}" for name, before, now in found),
                ]
        if was.data is not None:
            return []
        if found := _differences_without_fingerprint(was, info):
            raise UsageError(self._differs(info, found))
        return [
            f"note: {self.path} was begun by a version that did not record weights, amounts, stop rules, the split's "
            "salt and fraction, and packing: if these have changed since, other samples follow; names, seed, text and "
            "numbers of training documents are unchanged, and from now on everything is recorded"
        ]

    def _differs(self, info: RunInfo, found: list[tuple[str, str, str]]) -> str:
        renamed = "".join(
            f"; samples follow the corpus's name: the data of '{now}' needs a manifest with 'name: {before}'"
            for before, now in renamed_corpora(found)
        )
        return (
            f"{self.path}: the data of {info.mixture} is not what the run was begun with: "
            f"{describe_differences(found)}{renamed}; {ANOTHER_RUN}, or go on with the new data with "
            "data.allow_change=true"
        )

    def record(self, config: str) -> None:
        """Write `config.yaml` anew: on every start, and once the cut into stages is known."""
        write_atomic(self.config, config.encode())

    def _describe(self, info: RunInfo) -> None:
        write_atomic(self.path / DESCRIPTION, (info.model_dump_json(indent=1) + "\n").encode())

    def _tokenizer_path(self, info: TokenizerInfo) -> Path:
        return self.path / f"tokenizer{Path(info.file).suffix}"


def _differences_without_fingerprint(was: RunInfo, now: RunInfo) -> list[tuple[str, str, str]]:
    """What differs between two descriptions of which one has no fingerprint."""

    def parts(info: RunInfo) -> dict[str, str]:
        found = {"seed": str(info.mixture_seed), "corpora": ", ".join(corpus.name for corpus in info.corpora)}
        for corpus in info.corpora:
            found[f"corpora.{corpus.name}.bin"] = corpus.sha256
            found[f"corpora.{corpus.name}.training_documents"] = str(corpus.training_documents)
        return found

    return differences(parts(was), parts(now))


def _settled(attempts: list[Attempt]) -> list[Attempt]:
    """Earlier attempts: nobody holds the lock of the folder, so those without an end have ended all the same."""
    return [
        attempt if attempt.ended or attempt.reason else attempt.model_copy(update={"reason": KILLED})
        for attempt in attempts
    ]


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
        data=mixture.fingerprint,
    )
