"""The stages from text to an evaluated model, as the commands of sbatch: a pure function of what is asked for."""

import glob
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from pathlib import Path

from megazh.conversation.registry import sets_of
from megazh.corpus.listing import expand
from megazh.errors import UsageError
from megazh.run.folder import RunFolder
from megazh.training.checks.resume import is_complete
from megazh.training.model_source import find_model
from megazh.training.recipe import Recipe, read_recipe, run_recipe
from megazh.training.recipe_files import recipe_path

TEMPLATES = Path(__file__).resolve().parents[3] / "slurm"
"""Folder of the sbatch files; there is none in an installed wheel."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
_OPTION = re.compile(r"[a-z][a-z-]*(=.*)?")
_OWN = ("parsable", "dependency", "kill-on-invalid-dep", "job-name", "test-only", "wrap", "array", "wait", "help",
        "usage", "version")  # fmt: skip
_SHORTEST = 1024  # tokens of a question of `eval passkey`, which is hard to ask in fewer


class Stage(StrEnum):
    """A stage of the chain, in order."""

    INDEX = "index"
    """Text becomes an index of tokens."""
    PRETRAIN = "pretrain"
    SFT = "sft"
    """Fine-tuning on conversations."""
    LONGLORA = "longlora"
    """Fine-tuning at a longer context."""
    EVALUATE = "evaluate"
    """`megazh eval passkey` of the last run."""
    POSITION_LOSS = "position-loss"
    """`megazh eval position-loss` of the last run, where long documents are given."""


TRAINING = (Stage.PRETRAIN, Stage.SFT, Stage.LONGLORA)
_FILES = {
    Stage.INDEX: "index_corpus.sh",
    Stage.PRETRAIN: "pretrain_6x3090.sh",
    Stage.SFT: "finetune_6x3090.sh",
    Stage.LONGLORA: "longlora_6x3090.sh",
}


@dataclass(frozen=True)
class Wanted:
    """What is asked for; see `megazh slurm submit --help`."""

    text: Sequence[str] = ()
    tokenizer: Path | None = None
    conversations: Sequence[str] = ()
    long_conversations: Sequence[str] = ()
    long_documents: str | None = None
    recipes: dict[Stage, str] = field(
        default_factory=lambda: {
            Stage.PRETRAIN: "qwen0.5b_6x3090",
            Stage.SFT: "sft_qwen0.5b_6x3090",
            Stage.LONGLORA: "longlora_qwen0.5b_6x3090",
        }
    )
    """Recipe of each stage that trains."""
    name: str | None = None
    """Name of the chain. Default: that of the pretraining recipe; run folders are then runs/RECIPE."""
    base: str | None = None
    """Model that the chain begins with, in place of text and pretraining."""
    without: frozenset[Stage] = frozenset()
    sbatch: Sequence[str] = ()
    """Options of sbatch, as `[STAGE:]OPTION[=VALUE]`."""
    more: Sequence[str] = ()
    """Further words for the command of a stage, as `STAGE:WORD`."""


@dataclass(frozen=True)
class Link:
    """A stage as a job: its command, and what it leaves behind."""

    stage: Stage
    name: str
    """Name of the job."""
    sbatch: tuple[str, ...]
    """Options of sbatch."""
    template: Path
    arguments: tuple[str, ...]
    needs: Stage | None
    """Stage whose result this one reads."""
    result: Path
    """Index (prefix), run folder, or file of figures."""

    def command(self, after: str | None = None) -> list[str]:
        """The command line that submits it; `after`: job that has to have succeeded before."""
        waiting = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        own = ["--parsable", f"--job-name={self.name}", *waiting, *self.sbatch]
        return ["sbatch", *own, str(self.template), *self.arguments]

    @property
    def is_run(self) -> bool:
        """Whether its result is a run folder."""
        return self.stage in TRAINING

    @property
    def done(self) -> bool:
        """Whether its result is there, whole."""
        if self.stage is Stage.INDEX:
            return Path(f"{self.result}.idx").exists()
        if self.is_run:
            run = RunFolder(self.result)
            return run.exists and is_complete(run, run_recipe(run))
        return self.result.exists()


@dataclass(frozen=True)
class Chain:
    """All stages that are not left out, in order."""

    name: str
    links: tuple[Link, ...]

    @property
    def state(self) -> Path:
        """File that records what was submitted."""
        return Path("runs") / f"{self.name}.chain.json"


def make_chain(wanted: Wanted) -> Chain:
    """The chain that is asked for, whichever part of it is submitted.

    Raises:
        UsageError: an option cannot work, a file is missing, or a recipe cannot be read.
    """
    name = wanted.name or _recipe_name(wanted.recipes[Stage.PRETRAIN])
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--name {name!r}: expected letters, digits, '.', '_' and '-', at most 60; it names folders and jobs"
        )
    stages = _stages(wanted)
    sbatch, more = _by_stage("--sbatch", wanted.sbatch), _by_stage("--add", wanted.more)
    _check_options(sbatch)
    if None in more:
        raise UsageError(f"--add {more[None][0]}: expected STAGE:WORD, with a stage out of {', '.join(Stage)}")
    if unused := [stage for stage in (*sbatch, *more) if stage is not None and stage not in stages]:
        raise UsageError(f"--sbatch or --add {unused[0]}: that stage is left out")
    model: str | None = wanted.base  # the newest weights
    maker: Stage | None = None  # the stage that makes them
    length: int | None = None  # its seq_len
    links: list[Link] = []
    for stage in stages:
        words, needs, result = more.get(stage, []), maker, Path("data_index") / name
        if stage is Stage.INDEX:
            words = [*_index(wanted, result), *words]
        elif stage in TRAINING:
            data, result = result, _run(wanted, name, stage)
            if stage is Stage.PRETRAIN and Stage.INDEX in stages:
                needs, words = Stage.INDEX, [f"data.manifest={data}", *words]
            if model is not None:
                words = [f"checkpoint.initial_checkpoint={model}", *words]
            if result in [link.result for link in links]:
                raise UsageError(f"{result}: the run folder of two stages; give --name, or recipes of different names")
            recipe, words = _training(wanted, stage, result, words)
            model, maker, length = str(result), stage, recipe.batch.seq_len
        else:
            if model is None:
                raise UsageError("nothing to evaluate: every stage that trains is left out; give --base MODEL")
            folder = Path(model) if maker else Path("runs") / f"{name}-eval"
            result = folder / ("passkey.json" if stage is Stage.EVALUATE else "position-loss.json")
            words = [*_evaluation(wanted, stage, model, length), "--json", str(result), *words]
        options = tuple(f"--{option.removeprefix('--')}" for option in (*sbatch.get(None, []), *sbatch.get(stage, [])))
        links.append(Link(stage, f"{name}-{stage}", options, _template(stage), tuple(words), needs, result))
    return Chain(name, tuple(links))


def _stages(wanted: Wanted) -> list[Stage]:
    left_out = set(wanted.without)
    if not wanted.text:
        left_out.add(Stage.INDEX)
    elif Stage.INDEX in left_out:
        raise UsageError("--text is there for the index, which is left out; --from pretrain takes one that is there")
    if wanted.long_documents is None:
        left_out.add(Stage.POSITION_LOSS)
    if wanted.base is not None:
        left_out |= {Stage.INDEX, Stage.PRETRAIN}
        if wanted.text:
            raise UsageError("--base and --text exclude each other: the chain begins with a model, or with text")
        find_model(Path(wanted.base))
    stages = [stage for stage in Stage if stage not in left_out]
    if not stages:
        raise UsageError("every stage is left out")
    return stages


def _run(wanted: Wanted, name: str, stage: Stage) -> Path:
    """Run folder of a stage; without a name for the chain, the one that the recipe's runs have anyway."""
    if wanted.name is None:
        return Path("runs") / _recipe_name(wanted.recipes[stage])
    return Path("runs") / (name if stage is Stage.PRETRAIN else f"{name}-{stage}")


def _recipe_name(recipe: str) -> str:
    return re.sub(r"\.ya?ml$", "", Path(recipe).name)


def _index(wanted: Wanted, prefix: Path) -> list[str]:
    _check_files("--text", wanted.text)
    if wanted.tokenizer is None:
        raise UsageError(
            "--tokenizer: missing, and --text needs it: tokenizer.json or its folder, qwen.tiktoken, or *.model"
        )
    if not wanted.tokenizer.exists():
        raise UsageError(f"--tokenizer {wanted.tokenizer}: no such file or folder")
    _check_text("--tokenizer", str(wanted.tokenizer))
    return ["--input", *wanted.text, "--tokenizer", str(wanted.tokenizer), "--output", str(prefix)]


def _training(wanted: Wanted, stage: Stage, run: Path, words: list[str]) -> tuple[Recipe, list[str]]:
    """The recipe of a stage, and the arguments of its script."""
    name = wanted.recipes[stage]
    recipe, _ = read_recipe(recipe_path(name), [word for word in words if "=" in word and not word.startswith("-")])
    arguments = ["-c", name, "-r", str(run), *words]
    inputs = {Stage.SFT: wanted.conversations, Stage.LONGLORA: wanted.long_conversations}.get(stage, ())
    option = {Stage.SFT: "--conversations", Stage.LONGLORA: "--long-conversations"}.get(stage, "--text")
    if inputs:
        for each in sets_of(inputs):
            _check_files(option, each.inputs)
        return recipe, [*arguments, "-i", *inputs]
    manifest = recipe.data.manifest
    is_made = recipe.data.stories is not None or any(word.startswith("data.manifest=") for word in words)
    if not is_made and not Path(manifest).exists() and not Path(f"{manifest}.idx").exists():
        raise UsageError(
            f"{manifest}: no such file, and {stage} reads it; give the data with {option}, or make it first"
        )
    return recipe, arguments


def _evaluation(wanted: Wanted, stage: Stage, model: str, length: int | None) -> list[str]:
    """Arguments of `megazh eval`; `length`: tokens per sample of the run, where the chain makes it."""
    if stage is Stage.POSITION_LOSS:
        documents = wanted.long_documents or ""
        if not Path(f"{documents}.idx").exists():
            _check_files("--long-documents", [documents])
        return ["position-loss", model, documents]
    if length is None:
        return ["passkey", model]
    lengths = [min(_SHORTEST, length)]
    while lengths[-1] * 2 <= length:
        lengths.append(lengths[-1] * 2)
    return ["passkey", model, "--lengths", *map(str, lengths)]


def _template(stage: Stage) -> Path:
    path = TEMPLATES / _FILES.get(stage, "evaluate.sh")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; a chain is submitted from a checkout of the repository")
    return path


def _by_stage(option: str, words: Sequence[str]) -> dict[Stage | None, list[str]]:
    """Words such as `pretrain:steps=100` by stage; those without a stage under None."""
    found: dict[Stage | None, list[str]] = {}
    for word in words:
        _check_text(option, word)
        first, colon, rest = word.partition(":")
        if colon and rest and first in list(Stage):
            found.setdefault(Stage(first), []).append(rest)
        else:
            found.setdefault(None, []).append(word)
    return found


def _check_options(sbatch: dict[Stage | None, list[str]]) -> None:
    for option in chain.from_iterable(sbatch.values()):
        text = option.removeprefix("--")
        name = text.partition("=")[0]
        if not _OPTION.fullmatch(text):
            raise UsageError(
                f"--sbatch {text}: expected a long option of sbatch, such as partition=gpu or sft:time=8:00:00"
            )
        if name in _OWN:
            raise UsageError(f"--sbatch {text}: the chain itself decides on --{name}; leave it out")


def _check_text(option: str, text: str) -> None:
    if any(not each.isprintable() for each in text):
        raise UsageError(f"{option} {shlex.quote(text)}: has a line break or another character that is not printed")


def _check_files(option: str, inputs: Sequence[str]) -> None:
    """Raises UsageError where an input is neither a file, a folder nor a glob that matches one."""
    for text in inputs:
        _check_text(option, text)
        if not os.path.lexists(text) and not (glob.has_magic(text) and expand(text)):
            raise UsageError(f"{option} {text}: no such file or folder, and no glob that matches one")
