"""Whether the data of a run is there and fits it, from the manifest and the description of each index alone.

Nothing is packed, so that a dry run and a plan can look as well; `checked_mixture` checks what only the packed samples
can tell. Data that is still to be made, from `-i` or from stories, passes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from megazh.errors import Collector, DataError, UsageError
from megazh.index.manifest import CorpusEntry, Manifest, manifest_at
from megazh.index.metadata import CORE_SUFFIXES, Metadata, read_metadata
from megazh.model.counts import parameter_counts
from megazh.settings import COMMAND_LINE, Settings
from megazh.training.checks.resume import is_complete
from megazh.training.job import Case, Task
from megazh.training.recipe import Recipe

if TYPE_CHECKING:
    from megazh.index.mixture import Mixture

MANY_EPOCHS, TOO_MANY_EPOCHS = 4, 40
"""Up to 4 epochs, repeated text teaches about as much as new text; after 40 nothing more (arXiv 2305.16264)."""

_MOST_CORPORA = 6
"""Corpora that are listed one by one."""

_UNUSED_ROWS = 0.05
"""Share of the model's rows that may be without an id, as padding, before it is worth a warning."""


@dataclass(frozen=True)
class CorpusFacts:
    """What is known of a corpus without opening its index."""

    entry: CorpusEntry
    prefix: Path
    metadata: Metadata
    share: float
    """Share of the training samples."""
    training_tokens: float
    """Tokens on the training side, by the validation fraction."""


@dataclass(frozen=True)
class DataFacts:
    """What is known of the data without opening its indexes."""

    manifest: Manifest
    corpora: list[CorpusFacts]

    def epochs(self, recipe: Recipe) -> list[float]:
        """Epochs that a run of this recipe makes of each corpus."""
        tokens = recipe.course.total_tokens
        return [tokens * corpus.share / max(corpus.training_tokens, 1.0) for corpus in self.corpora]


def is_there(recipe: Recipe) -> bool:
    """Whether the manifest exists, or the index of which `data.manifest` is the PREFIX."""
    return Path(recipe.data.manifest).is_file() or Path(f"{recipe.data.manifest}.idx").is_file()


@lru_cache(maxsize=8)
def _read(path: Path, modified: int) -> DataFacts:
    described = manifest_at(path)
    found, metadata = Collector(), []
    for entry in described.corpora:
        prefix = path.parent / entry.prefix
        with found.collecting():
            known = read_metadata(prefix)
            if known is not None:
                metadata.append(known)
            elif Path(f"{prefix}.idx").is_file():
                raise DataError(
                    f"corpus '{entry.name}': {prefix}.json: missing; a mixture needs its tokenizer and hashes: for an "
                    f"index of Megatron-LM, 'megazh index adopt {prefix} --tokenizer TOK' makes it"
                )
            else:
                raise UsageError(
                    f"corpus '{entry.name}': no index {prefix}.idx; a prefix is relative to the manifest's folder, "
                    f"{path.parent}"
                )
    found.raise_all()
    kept = 1.0 - (described.validation.fraction if described.validation else 0.0)
    trained = [known.tokens * kept for known in metadata]
    amounts = [
        entry.weight or entry.tokens or (entry.epochs or 0.0) * tokens
        for entry, tokens in zip(described.corpora, trained, strict=True)
    ]
    return DataFacts(
        described,
        [
            CorpusFacts(entry, path.parent / entry.prefix, known, amount / (sum(amounts) or 1.0), tokens)
            for entry, known, amount, tokens in zip(described.corpora, metadata, amounts, trained, strict=True)
        ],
    )


def facts(recipe: Recipe) -> DataFacts | None:
    """What is known of the data; None where it is not there. Raises UsageError and DataError where it is damaged."""
    path = Path(recipe.data.manifest)
    prefix = path.with_suffix("")
    if path.suffix in CORE_SUFFIXES and path.is_file() and Path(f"{prefix}.idx").is_file():
        raise UsageError(f"data.manifest={path}: a file of an index; give its PREFIX, data.manifest={prefix}")
    return _read(path, path.stat().st_mtime_ns if path.exists() else 0) if is_there(recipe) else None


def needed_facts(case: Case) -> DataFacts | None:
    """The facts that checks compare; None where there are none yet, or a complete run needs them no longer."""
    return None if is_complete(case.run, case.recipe) else facts(case.recipe)


def makes_data(case: Case) -> bool:
    """Whether a start makes the data itself: from `-i`, or stories for a recipe that asks for them.

    Stories are only made at the path that stands beside their number in a recipe, or where the command line gives that
    number, and not into a folder that holds anything else.
    """
    if case.request.inputs:
        return True
    manifest, place = Path(case.recipe.data.manifest), case.settings.origin
    where, stories = place("data.manifest") or "", place("data.stories") or ""
    together = stories == COMMAND_LINE or where.rpartition(":")[0] == stories.rpartition(":")[0] != ""
    if not case.recipe.data.stories or not together or manifest.name != "mixture.yaml":
        return False
    folder = manifest.parent
    if not folder.exists() or (folder / "prepared.json").exists():
        return True
    # Hidden files are what an interrupted preparation may leave.
    return folder.is_dir() and all(file.name == "prepare.lock" or file.name[0] == "." for file in folder.iterdir())


def manifest(case: Case) -> Iterator[str]:
    """The manifest and its indexes are there, or a start makes them."""
    if is_complete(case.run, case.recipe):
        return
    path = Path(case.recipe.data.manifest)
    if is_there(case.recipe):
        _ = facts(case.recipe)
        return
    if case.planned or makes_data(case):
        return
    message = f"data.manifest={path}: {_why_missing(path, case.request.task)}"
    if not case.request.dry_run:
        raise UsageError(message)
    yield f"warning: {case.settings.with_places(message)}; a start will refuse that"


def _why_missing(path: Path, task: Task) -> str:
    """What is at a path in place of data, and what may be meant or made."""
    if path.is_dir():
        return f"is a folder; give a manifest in it, such as {path / 'NAME.yaml'}, or the PREFIX of an index"
    if not path.parent.is_dir():
        return f"no such file (there is no folder {path.parent}); {_how_to_index(path, task)}"
    by_stem = path.with_suffix("")
    if path.suffix in (".yaml", ".yml") and Path(f"{by_stem}.idx").is_file():
        return f"no such file, but an index of that name is there; give its PREFIX, data.manifest={by_stem}"
    files = [*path.parent.glob("*.y*ml"), *(file.with_suffix("") for file in path.parent.glob("*.idx"))]
    near = difflib.get_close_matches(path.name, [file.name for file in files], n=1, cutoff=0.5)
    meant = f" (did you mean {path.parent / near[0]}?)" if near else ""
    return f"no such file{meant}; {_how_to_index(path, task)}"


def _how_to_index(path: Path, task: Task) -> str:
    if task is not Task.PRETRAIN:
        return (
            "give your conversations with -i, or convert them with 'megazh sft convert INPUT --tokenizer TOKENIZER -o "
            f"{path.parent}' (docs/finetuning.md)"
        )
    prefix = path.with_suffix("") if path.suffix in (".yaml", ".yml") else path
    return (
        "make an index with 'megazh index build --input TEXT --tokenizer TOKENIZER --output "
        f"{prefix}' and give data.manifest={prefix} (docs/data.md: The mixture)"
    )


def tokenizers(case: Case) -> Iterator[str]:
    """All corpora are encoded with one tokenizer."""
    found = needed_facts(case)
    if found is None:
        return
    first, *others = found.corpora
    different = [
        other.entry.name
        for other in others
        if other.metadata.tokenizer.fingerprint != first.metadata.tokenizer.fingerprint
    ]
    if different:
        raise UsageError(
            f"{case.recipe.data.manifest}: the corpora have different tokenizers: {', '.join(map(repr, different))} "
            f"not that of '{first.entry.name}'; index all with the same one"
        )
    yield from ()


def vocabulary(case: Case) -> Iterator[str]:
    """Every id has a row in the model, and few rows are without one."""
    found = needed_facts(case)
    if found is None:
        return
    rows, model = case.recipe.model.vocab_size, case.recipe.model
    ids = max(corpus.metadata.tokenizer.vocab_size for corpus in found.corpora)
    fitting = -(-ids // 64) * 64
    if ids > rows:
        weights = case.recipe.checkpoint.initial_checkpoint
        remedy = (
            f"set model.vocab_size={fitting}, or index with the recipe's tokenizer"
            if weights is None
            else f"make the data with the tokenizer of {weights}"
        )
        raise UsageError(
            f"the tokenizer of {case.recipe.data.manifest} has ids up to {ids - 1}, and the model has {rows} rows: "
            f"{remedy}"
        )
    unused = rows - ids
    if unused <= rows * _UNUSED_ROWS:
        return
    lost = unused * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    share = lost / parameter_counts(model).total
    word = "WARNING" if unused > rows / 2 else "warning"
    yield case.settings.with_places(
        f"{word}: {unused:,} of the model's {rows:,} rows are never used: the tokenizer of {case.recipe.data.manifest} "
        f"has {ids:,} ids. They are {lost:,} parameters ({share:.0%} of the model); set model.vocab_size={fitting}, or "
        "index with the recipe's tokenizer"
    )


def epochs(case: Case) -> Iterator[str]:
    """The length of the run does not repeat a corpus more often than helps."""
    found = needed_facts(case)
    if found is None:
        return
    course = case.recipe.course
    tokens = course.total_tokens
    for corpus, count in zip(found.corpora, found.epochs(case.recipe), strict=True):
        if count <= MANY_EPOCHS:
            continue
        loud = count > TOO_MANY_EPOCHS
        useful = MANY_EPOCHS * corpus.training_tokens / corpus.share
        why = "after 40 a model learns nothing more" if loud else "above 4, repeated text teaches ever less"
        in_steps = case.recipe.schedule.tokens is None
        less = f"steps={max(1, course.steps_within(useful))}" if in_steps else f"tokens={_amount(useful)}"
        yield case.settings.with_places(
            f"{'WARNING' if loud else 'warning'}: corpus '{corpus.entry.name}': {tokens:,} tokens are {count:,.0f} "
            f"epochs of its {corpus.training_tokens:,.0f} tokens; {why} (arXiv 2305.16264): give more text, or "
            f"schedule.{less} for {MANY_EPOCHS}"
        )


def _amount(tokens: float) -> str:
    """A number of tokens as a setting has it, rounded down to two digits: 950K, 1.5M, 30B."""
    scale, unit = next((pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if tokens >= pair[0]), (1.0, ""))
    number = int(tokens / scale * 10) / 10 if tokens < 10 * scale else int(tokens / scale)
    return f"{max(number, 1):g}{unit}"


def validation(case: Case) -> Iterator[str]:
    """Where the recipe validates, the manifest keeps documents for it."""
    found = needed_facts(case)
    if found is None or not case.recipe.evaluation.validate_every:
        return
    kept = found.manifest.validation
    documents = sum(corpus.metadata.documents for corpus in found.corpora)
    path = case.recipe.data.manifest
    if kept is None or not kept.fraction:
        what = f"{path} keeps no documents for it"
    elif kept.fraction * documents < 1:
        what = f"{path} keeps a share of {kept.fraction:g} of {documents} documents, likely none"
    else:
        return
    yield case.settings.with_places(
        f"warning: nothing will be validated although evaluation.validate_every="
        f"{case.recipe.evaluation.validate_every}: {what}; add 'validation: {{fraction: 0.01, salt: v1}}' to the "
        "manifest (a larger fraction for little text)"
    )


def checked_mixture(recipe: Recipe, settings: Settings) -> Mixture:
    """Open the data of a recipe, and check that the prompts and the length of the run fit it. Packs the samples.

    Args:
        recipe: the recipe.
        settings: its values with the places where they were written, for errors.

    Raises:
        UsageError: a prompt without a token, or a mixture that ends too early.
        DataError: an index is damaged.
    """
    from megazh.index.metadata import load_tokenizer_of

    mixture = recipe.open_mixture()
    found = Collector()
    tokenizer = load_tokenizer_of(mixture.corpora[0].prefix, mixture.corpora[0].metadata)
    for prompt in recipe.evaluation.sample_prompts:
        if not tokenizer.encode(prompt):
            message = f"sample_prompts: {prompt!r} has no token to continue from; give at least one character"
            found.add(UsageError(settings.with_places(message)))
    course = recipe.course
    needed = course.samples_before(course.steps)
    if mixture.end is not None and needed > mixture.end:
        steps = course.batches.step_of(mixture.end)
        message = (
            f"the run takes {needed:,} samples, and {recipe.data.manifest} ends after {mixture.end:,} "
            f"(on_exhausted: stop); set {f'steps={steps}, or ' if steps else ''}on_exhausted: wrap"
        )
        found.add(UsageError(settings.with_places(message)))
    found.raise_all()
    return mixture


def describe_data(recipe: Recipe) -> Iterator[str]:
    """Lines on the data for the terminal: corpora with their epochs, and rows of the model that no id uses."""
    found = facts(recipe)
    if found is None:
        yield f"{'data':<12}{recipe.data.manifest} (not there yet)"
        return
    yield f"{'data':<12}{recipe.data.manifest}"
    for corpus, count in list(zip(found.corpora, found.epochs(recipe), strict=True))[:_MOST_CORPORA]:
        epochs_of = f"{count:.2f}" if count < 10 else f"{count:,.0f}"
        yield f"{'':<12}{corpus.entry.name}: {corpus.training_tokens:,.0f} tokens to train on, {epochs_of} epochs"
    if len(found.corpora) > _MOST_CORPORA:
        yield f"{'':<12}and {len(found.corpora) - _MOST_CORPORA} more corpora"
    ids, rows = max(corpus.metadata.tokenizer.vocab_size for corpus in found.corpora), recipe.model.vocab_size
    yield f"{'vocabulary':<12}{ids:,} ids for {rows:,} rows of the model, {max(rows - ids, 0):,} of them never used"
