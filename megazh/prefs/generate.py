"""Preference rows from a model: the answer of the data is chosen, the model's own answer is rejected."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megazh.conversation.faults import RowError
from megazh.conversation.rejects import Rejects, new_rows, rejected_path
from megazh.conversation.rows import find_rows, read_rows
from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import Source
from megazh.errors import DataError
from megazh.model.sampling import SamplingOptions
from megazh.prefs.answers import Answers
from megazh.prefs.files import check_output, only_writer
from megazh.prefs.forms import Template
from megazh.prefs.rows import Instruction, instruction_of
from megazh.progress import Progress
from megazh.tensor_file import bytes_of
from megazh.training.text_model import TextModel, open_model

_PAIR, _EQUAL, _EMPTY, _LONG = "pair", "equal", "empty", "long"


@dataclass(frozen=True)
class Request:
    """What to answer, with which model, and how."""

    model: Path
    """A model as `open_model` takes it."""
    inputs: Sequence[str]
    output: Path
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(top_p=0.95))
    max_tokens: int = 256
    """Largest number of tokens of an answer; fewer where prompt and answer would exceed the trained length."""
    seed: int = 0
    template: Template = field(default_factory=Template)
    limit: int | None = None
    """Number of rows to answer; None for all."""
    checkpoint: str | None = None
    device: str | None = None
    format: Format | None = None
    encoding: str | None = None
    overwrite: bool = False

    @property
    def partial(self) -> Path:
        """File with the answers so far."""
        return self.output.with_name(f"{self.output.name}.partial")


def generate(request: Request, say: Callable[[str], None]) -> None:
    """Write `request.output`, a JSONL file of `prompt`, `chosen`, `rejected`, in TRL's standard form.

    Each row has random draws of its own, from the seed and the number of the row: an interrupted command that is
    continued gives the same file.

    Args:
        request: see `Request`.
        say: called with each line for the person at the terminal: what was left out, and counts at the end.

    Raises:
        UsageError: an input, the output, the model or a setting cannot work, or differs from the interrupted command.
        DataError: a file is damaged, or no row gives a pair.
        BusyError: another process writes the same output.
        WriteError: the output cannot be written; the answers so far are kept.
    """
    listing, options = find_rows(request.inputs, request.format, request.encoding)
    sources = listing.sources
    check_output(request.output, sources, request.overwrite)
    for line in listing.notes():
        say(line)
    with only_writer(request.output), Rejects(rejected_path(request.output)) as rejects:
        total = sum(1 for _ in _instructions(sources, options, request, rejects))
        if not total:
            first = f": {rejects.describe()}; first: {rejects.first}" if rejects.total else ""
            raise DataError(f"no row with a prompt and an answer in the input{first}")
        model = open_model(request.model, request.checkpoint, request.device)
        answers = Answers(request.partial, _settings(request, model, sources), request.overwrite)
        if answers.count:
            say(f"{request.partial}: {answers.count:,} of {total:,} rows are answered already; going on after them")
        try:
            _answer_all(request, model, _instructions(sources, options, request), total, answers)
        finally:
            answers.close()
        _finish(request, answers, rejects, say)


def _instructions(
    sources: Sequence[Source], options: ReadOptions, request: Request, rejects: Rejects | None = None
) -> Iterator[tuple[str, Instruction]]:
    """(prompt as text, instruction) of each good row, up to the limit; others go to `rejects`."""

    def found() -> Iterator[tuple[str, Instruction]]:
        for source in sources:
            for row in read_rows(source, options):
                try:
                    if isinstance(row.value, RowError):
                        raise row.value
                    instruction = instruction_of(row.value)
                    yield request.template(instruction.prompt), instruction
                except RowError as error:
                    if rejects:
                        rejects.add(source.name, row.line, error)

    return itertools.islice(found(), request.limit)


def _settings(request: Request, model: TextModel, sources: Sequence[Source]) -> dict[str, Any]:
    """What the answers depend on. The limit is not part of it: fewer rows are the first of more rows."""
    return {
        "model": _weights_hash(model),
        "tokenizer": model.tokenizer.fingerprint,
        "ends": sorted(model.end_ids),
        "input": [[source.name, source.size] for source in sources],
        "template": request.template.text,
        "sampling": asdict(request.sampling),
        "max_tokens": request.max_tokens,
        "seed": request.seed,
    }


def _weights_hash(model: TextModel) -> str:
    digest = xxhash.xxh3_128()
    for name, weight in sorted(model.model.named_parameters()):
        digest.update(name.encode())
        digest.update(bytes_of(weight.cpu()))
    return digest.hexdigest()


def _answer_all(
    request: Request, model: TextModel, rows: Iterator[tuple[str, Instruction]], total: int, answers: Answers
) -> None:
    done = answers.count
    with Progress("answering", max(total - done, 0), unit="rows") as progress:
        for number, (prompt, instruction) in enumerate(itertools.islice(rows, done, None), start=done):
            answer, tokens = _answer(request, model, number, prompt, instruction)
            answers.add(answer)
            progress.advance(1, tokens)


def _answer(
    request: Request, model: TextModel, number: int, prompt: str, instruction: Instruction
) -> tuple[dict[str, Any], int]:
    """The line for one row, and the number of tokens that were generated."""
    room = model.trained_length - len(model.tokenizer.encode(prompt))
    if room < 1:
        return {"outcome": _LONG}, 0
    most = min(request.max_tokens, room)
    pieces = list(model.stream(prompt, most, request.sampling, row_seed(request.seed, number)))
    tokens = len(pieces) - 1  # the last piece is the rest of the text, not a token
    text, chosen = "".join(pieces).strip(), instruction.answer.strip()
    if not text:
        return {"outcome": _EMPTY}, tokens
    if text == chosen:
        return {"outcome": _EQUAL}, tokens
    pair = {"prompt": prompt, "chosen": chosen, "rejected": text}
    return {"outcome": _PAIR, "row": pair, "cut": tokens == most}, tokens


def row_seed(seed: int, number: int) -> int:
    """Seed of the random draws for row `number`, from 0 to 2^32 - 1."""
    return xxhash.xxh3_64_intdigest(f"{seed} {number}".encode()) >> 32


def _finish(request: Request, answers: Answers, rejects: Rejects, say: Callable[[str], None]) -> None:
    outcomes: Counter[str] = Counter()
    with new_rows(request.output) as rows:
        for answer in itertools.islice(answers.read(), request.limit):
            outcomes[answer["outcome"]] += 1
            if answer["outcome"] == _PAIR:
                rows.add(answer["row"])
                outcomes["cut"] += answer["cut"]
        if not rows.rows:
            raise DataError(
                f"no row to write: {outcomes[_EMPTY]:,} answers are empty, {outcomes[_EQUAL]:,} are equal to the "
                f"data's, {outcomes[_LONG]:,} prompts are too long for the model; give other rows, or --force with "
                "another --temperature"
            )
        rejects.commit()
        rows.commit()
    answers.remove()
    say(f"{request.output}: {rows.rows:,} rows of prompt, chosen (the data's answer), rejected (the model's own)")
    for outcome, what in (
        (_EQUAL, "dropped: {:,} answers that are equal to the data's"),
        (_EMPTY, "dropped: {:,} empty answers"),
        (_LONG, "dropped: {:,} prompts as long as what the model was trained on at a time, or longer"),
        ("cut", "{:,} answers end at --max-tokens, or at the length that the model was trained on"),
    ):
        if outcomes[outcome]:
            say(what.format(outcomes[outcome]))
    if rejects.total:
        say(f"{rejects.path}: {rejects.total:,} rejected rows: {rejects.describe()}")
