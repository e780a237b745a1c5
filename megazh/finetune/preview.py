"""What fine-tuning would train on: some conversations with their trained tokens, and counts over many of them."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from megazh.conversation.encode import Encoded
from megazh.conversation.faults import RowError
from megazh.conversation.reading import Count, DataSets, Sample
from megazh.errors import DataError
from megazh.finetune.fit import Fitted, Fitting
from megazh.progress import Progress
from megazh.tokenizer import Tokenizer

_FIRST_BIN = 16  # tokens
# Characters that would act on a terminal or a page instead of being seen: C0 and C1 controls, directions of writing.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Kind(StrEnum):
    """What a run of shown text is."""

    TEXT = "text"
    CONTROL = "control"
    """Control tokens."""
    LOOKALIKE = "lookalike"
    """Ordinary tokens that read like a control token."""


@dataclass(frozen=True)
class Run:
    """Text of tokens that are alike."""

    text: str
    kind: Kind
    trained: bool


@dataclass(frozen=True)
class Shown:
    """A conversation that is shown."""

    sample: Sample
    fitted: Fitted
    runs: list[Run]

    def describe(self) -> str:
        """One line: where it comes from, its tokens, and what was cut."""
        encoded, sample = self.fitted.encoded, self.sample
        line = (
            f"{sample.set}: {sample.file} row {sample.row:,}: {len(encoded):,} tokens, "
            f"{percent(int(encoded.trained.sum()), len(encoded))} trained"
        )
        if self.fitted.is_cut:
            left, turns = len(self.fitted.conversation.turns), len(sample.conversation.turns)
            line += f", cut from {self.fitted.whole:,} tokens: {left} of {turns} turns are left"
        return visible(line)


@dataclass
class Preview:
    """What was found in data sets."""

    shown: list[Shown] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens of each conversation that is trained on."""
    trained: int = 0
    """Trained tokens of all of them."""
    longest: int = 0
    """Tokens of the longest conversation before it was cut."""
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Conversations without a sample, by reason."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Rows that are no conversation, by reason."""
    sets: dict[str, Count] = field(default_factory=dict)
    """What became of the rows of each set."""
    warnings: list[str] = field(default_factory=list)
    damage: DataError | None = None
    """Files that break off; what stands before the break is counted."""

    @property
    def tokens(self) -> int:
        """Tokens of all conversations that are trained on."""
        return sum(self.lengths)


def look(data: DataSets, fitting: Fitting, show: int, limit: int | None) -> Preview:
    """Read conversations, and take them as training would.

    Args:
        data: the data sets.
        fitting: how conversations are made into samples.
        show: number of conversations to show: the first ones that are trained on.
        limit: largest number of conversations of each set, for the progress bar: the sets themselves are limited to
            it. None for all.
    """
    found, tokenizer = Preview(), fitting.tokenizer
    lookalikes = _lookalikes(tokenizer)
    like_control = unknown = 0
    total = data.size if limit is None else limit * len(data.sets)
    with Progress("preview", total, unit="B" if limit is None else "conversations") as progress:
        try:
            for sample in data.read(progress=progress if limit is None else None):
                if limit is not None:
                    progress.advance(1)
                try:
                    fitted = fitting.fit(sample.conversation)
                except RowError as error:
                    found.dropped[error.fault.value] += 1
                    continue
                _count(found, fitted)
                like_control += any(lookalikes.search(turn.text) for turn in fitted.conversation.turns)
                unknown += tokenizer.unk_id is not None and bool((fitted.encoded.ids == tokenizer.unk_id).any())
                if len(found.shown) < show:
                    found.shown.append(Shown(sample, fitted, list(runs_of(fitted.encoded, tokenizer))))
        except DataError as error:
            found.damage = error
    found.sets = dict(data.counts)
    for count in found.sets.values():
        found.rejected.update(count.rejected)
    found.warnings = [*fitting.template.warnings, *_warnings(found, like_control, unknown)]
    return found


def _count(found: Preview, fitted: Fitted) -> None:
    found.lengths.append(len(fitted.encoded))
    found.trained += int(fitted.encoded.trained.sum())
    found.longest = max(found.longest, fitted.whole)
    found.cut += fitted.is_cut


def _warnings(found: Preview, like_control: int, unknown: int) -> Iterator[str]:
    if not found.lengths:
        yield "no conversation is left to train on"
    if like_control:
        yield (
            f"{like_control:,} conversations have text that reads like a control token; it is encoded as ordinary text"
        )
    if unknown:
        yield f"{unknown:,} conversations have characters that the tokenizer does not know"


def runs_of(encoded: Encoded, tokenizer: Tokenizer) -> Iterator[Run]:
    """Tokens as text, in runs of tokens that are alike. What would act on a terminal or a page is written out."""
    if not len(encoded):
        return
    lookalikes = _lookalikes(tokenizer)
    is_control = np.isin(encoded.ids, np.array(sorted(tokenizer.control_ids), np.int32))
    changes = np.flatnonzero((np.diff(is_control) != 0) | (np.diff(encoded.trained) != 0)) + 1
    for ids, control, trained in _pieces(encoded, is_control, changes):
        text = visible(tokenizer.decode(ids))
        if control:
            yield Run(text, Kind.CONTROL, trained)
            continue
        for at, part in enumerate(lookalikes.split(text)):
            if part:
                yield Run(part, Kind.LOOKALIKE if at % 2 else Kind.TEXT, trained)


def _pieces(
    encoded: Encoded, is_control: npt.NDArray[np.bool_], changes: npt.NDArray[np.intp]
) -> Iterator[tuple[list[int], bool, bool]]:
    edges = [0, *changes.tolist(), len(encoded)]
    for begin, end in itertools.pairwise(edges):
        yield encoded.ids[begin:end].tolist(), bool(is_control[begin]), bool(encoded.trained[begin])


def _lookalikes(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds the strings of control tokens; as a group, so that `split` keeps them."""
    strings = sorted(map(tokenizer.piece, tokenizer.control_ids), key=lambda text: (-len(text), text))
    return re.compile(f"({'|'.join(map(re.escape, strings))})")


def visible(text: str) -> str:
    """`text` with unseen characters as Python writes them, but for line breaks and tabs."""
    return _UNSEEN.sub(lambda found: repr(found.group())[1:-1], text)


def histogram(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Bins of doubling width: (smallest length, largest length, number of lengths), up to the longest length."""
    if not lengths:
        return []
    edges = [1, _FIRST_BIN + 1]
    while edges[-1] <= max(lengths):
        edges.append(2 * edges[-1] - 1)
    counts = np.histogram(lengths, edges)[0].tolist()
    return [(low, high - 1, count) for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)]


def percent(part: int, whole: int) -> str:
    """`part` of `whole` in percent."""
    return f"{100 * part / max(whole, 1):.1f} %"


def facts(found: Preview, fitting: Fitting) -> Iterator[tuple[str, str]]:
    """Name and value of the counts, for the person who reads them."""
    template = fitting.template
    yield "template", f"{template.name}; {template.stop} ends an answer"
    yield "conversations", f"{len(found.lengths):,} to train on"
    yield "tokens", f"{found.tokens:,}, {percent(found.trained, found.tokens)} of them trained"
    yield "cut", f"{found.cut:,} conversations"
    yield "dropped", _reasons(found.dropped, "conversations")
    yield "rejected", _reasons(found.rejected, "rows")
    if found.lengths:
        median, most = (int(value) for value in np.percentile(found.lengths, (50, 95), method="lower"))
        line = f"{median:,} tokens in the middle, 95 % up to {most:,}, the longest {max(found.lengths):,}"
        yield "length", line + (f" ({found.longest:,} before the cut)" if found.cut else "")


def _reasons(counts: Counter[str], what: str) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
    return f"{counts.total():,} {what}" + (f": {reasons}" if reasons else "")
