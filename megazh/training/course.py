"""The course of a run: batch, segment length, learning rate and what was consumed before, as functions of the step.

Steps are counted from 0 here; "before step n" is what the steps 0 to n - 1 consumed. Nothing else computes any of it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

from megazh.config import parse_amount
from megazh.errors import UsageError
from megazh.index.choices import Cut


class Kind(StrEnum):
    """Shape of the learning rate behind the warm-up."""

    COSINE = "cosine"
    """Half a cosine down to the last step (Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts)."""
    WSD = "wsd"
    """The peak, then linear over the last steps, `schedule.decay` (warm-up, stable, decay: arXiv 2404.06395)."""
    LINEAR = "linear"
    """Linear down to the last step."""
    CONSTANT = "constant"
    """The peak to the end."""
    INVERSE_SQRT = "inverse_sqrt"
    """The peak times the square root of warm-up / steps so far (arXiv 1706.03762), whatever the length of the run."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step.

    It rises by peak / warmup per step and reaches the peak at step `warmup` - 1 (at step 0 without warm-up). A run of
    warm-up only ends at the peak.
    """

    kind: Kind
    peak: float
    steps: int
    """Length of the run in optimizer steps."""
    warmup: int
    """Length of the warm-up in steps."""
    min_ratio: float
    """Learning rate at the last step, relative to the peak; not for constant and inverse_sqrt."""
    decay: int = 0
    """With wsd, length of the decay in steps."""

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`; beyond the last step that of the last."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        top, last = max(self.warmup - 1, 0), self.steps - 1
        match self.kind:
            case Kind.CONSTANT:
                return self.peak
            case Kind.INVERSE_SQRT:
                return self.peak * math.sqrt(max(self.warmup, 1) / (step + 1))
            case Kind.WSD:
                top = max(top, last - self.decay)
        progress = min(max(step - top, 0) / max(last - top, 1), 1.0)
        if self.kind is Kind.COSINE:
            return self.peak * (self.min_ratio + (1 - self.min_ratio) * (1 + math.cos(math.pi * progress)) / 2)
        return self.peak * (1 - (1 - self.min_ratio) * progress)


@dataclass(frozen=True)
class Part:
    """Steps of one batch size, up to the next part."""

    first_step: int
    samples_before: int
    """Samples consumed before the first step."""
    batch: int
    """Samples per step."""


class Batches:
    """Samples per step by the tokens that were consumed before it.

    A size begins at the first step before which at least its tokens were consumed.

    Args:
        sizes: samples per step by tokens consumed before; the first key is 0.
        seq_len: tokens per sample.

    Raises:
        UsageError: the keys do not begin with 0, or a size is below 1.
    """

    def __init__(self, sizes: Mapping[int, int], seq_len: int) -> None:
        if not sizes or min(sizes) != 0:
            raise UsageError("schedule.batch: expected a size from 0 tokens on, such as {0: 128, 2B: 256}")
        if wrong := [size for size in sizes.values() if size < 1]:
            raise UsageError(f"schedule.batch: {wrong[0]} samples: expected at least 1")
        self.seq_len = seq_len
        self.parts: list[Part] = []
        for tokens, size in sorted(sizes.items()):
            if not self.parts:
                self.parts.append(Part(0, 0, size))
                continue
            before = self.parts[-1]
            samples = -(-tokens // seq_len) - before.samples_before
            steps = max(0, -(-samples // before.batch))
            part = Part(before.first_step + steps, before.samples_before + steps * before.batch, size)
            if part.first_step == before.first_step:  # a key that the steps before have passed already
                self.parts.pop()
            self.parts.append(part)
        self._firsts = [part.first_step for part in self.parts]
        self._samples = [part.samples_before for part in self.parts]

    def size(self, step: int) -> int:
        """Samples of step `step`."""
        return self._part(step).batch

    def samples_before(self, step: int) -> int:
        """Samples that were consumed before step `step`."""
        part = self._part(step)
        return part.samples_before + (step - part.first_step) * part.batch

    def steps_for(self, tokens: float) -> int:
        """The smallest number of steps that consume at least `tokens`."""
        step = self.step_of(max(math.ceil(tokens / self.seq_len), 0))
        return step if self.samples_before(step) * self.seq_len >= tokens else step + 1

    def step_of(self, sample: int) -> int:
        """The step that takes sample `sample`, counted from 0."""
        part = self.parts[bisect_right(self._samples, sample) - 1]
        return part.first_step + (sample - part.samples_before) // part.batch

    def _part(self, step: int) -> Part:
        return self.parts[bisect_right(self._firsts, step) - 1]


class Lengths:
    """Longest segment of a packed sample by the tokens that were consumed before its step.

    Args:
        lengths: tokens per segment by tokens consumed before; the first key is 0.
        seq_len: tokens per sample, the largest length.

    Raises:
        UsageError: the keys do not begin with 0, or a length is below 2 or above `seq_len`.
    """

    def __init__(self, lengths: Mapping[int, int], seq_len: int) -> None:
        self.tokens, self._lengths = sorted(lengths), [lengths[key] for key in sorted(lengths)]
        if not self.tokens or self.tokens[0] != 0:
            raise UsageError("schedule.length: expected a length from 0 tokens on, such as {0: 64, 1B: 128}")
        for length in self._lengths:
            if not 2 <= length <= seq_len:
                raise UsageError(f"schedule.length: {length} tokens: expected 2 to batch.seq_len={seq_len}")

    def at(self, tokens_before: int) -> int:
        """Tokens per segment of a step before which so many tokens were consumed."""
        return self._lengths[bisect_right(self.tokens, tokens_before) - 1]


@dataclass(frozen=True)
class Course:
    """The course of a run of `steps` optimizer steps."""

    steps: int
    batches: Batches
    lengths: Lengths
    kind: Kind
    peak: float
    """Peak learning rate."""
    warmup: float | str
    """Length of the warm-up; see `resolve`."""
    decay: float | str
    """Length of the decay of wsd; see `resolve`."""
    min_ratio: float
    label_at_cut: bool
    """Whether the last token of a segment that ends at a cut is trained to predict the next one."""

    @cached_property
    def schedule(self) -> Schedule:
        """The learning rate.

        Raises:
            UsageError: warm-up or decay are neither shares nor steps nor tokens, or do not fit into the run.
        """
        warmup = resolve("schedule.warmup", self.warmup, self.steps, self.batches.steps_for)
        decay = 0
        if self.kind is Kind.WSD:
            decay = resolve("schedule.decay", self.decay, self.steps, self._last_steps_for)
            if warmup + decay > self.steps:
                raise UsageError(
                    f"schedule.warmup={self.warmup} and schedule.decay={self.decay}: {warmup:,} steps of warm-up and "
                    f"{decay:,} of decay are more than the run's {self.steps:,}; lower one of them, or train longer"
                )
        return Schedule(self.kind, self.peak, self.steps, warmup, self.min_ratio, decay)

    def _last_steps_for(self, tokens: int) -> int:
        """The smallest number of steps at the end of the run that consume at least `tokens`."""
        left = self.total_tokens - tokens
        return self.steps - self.steps_within(left) if left >= 0 else self.batches.steps_for(tokens)

    def rate(self, step: int) -> float:
        """The learning rate of step `step`. Raises as `schedule`."""
        return self.schedule.rate(step)

    def samples(self, step: int) -> int:
        """Samples of step `step`."""
        return self.batches.size(step)

    def tokens(self, step: int) -> int:
        """Tokens of step `step`."""
        return self.samples(step) * self.batches.seq_len

    def samples_before(self, step: int) -> int:
        """Samples that were consumed before step `step`, thus by so many steps."""
        return self.batches.samples_before(step)

    def tokens_before(self, step: int) -> int:
        """Tokens that were consumed before step `step`, thus by so many steps."""
        return self.samples_before(step) * self.batches.seq_len

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens_before(self.steps)

    def length(self, step: int) -> int:
        """Tokens of the longest segment of step `step`: longer pieces of documents are cut."""
        return self.lengths.at(self.tokens_before(step))

    def cut_of(self, sample: int) -> Cut | None:
        """The cuts of sample `sample`, counted from 0 over the run; None where it stays as it was packed."""
        length = self.length(self.batches.step_of(sample))
        return None if length == self.batches.seq_len else Cut(length, self.label_at_cut)

    def sizes(self) -> list[int]:
        """Samples per step of the parts that the run reaches, each once, in order."""
        return list(dict.fromkeys(part.batch for part in self.batches.parts if part.first_step < self.steps))

    def steps_within(self, tokens: float) -> int:
        """The largest number of steps that consume no more than `tokens`."""
        steps = self.batches.steps_for(tokens)
        return steps if self.tokens_before(steps) <= tokens else steps - 1

    def parts(self) -> Iterator[range]:
        """The steps of the run, in parts of one batch size and one length."""
        firsts = {part.first_step for part in self.batches.parts}
        firsts |= {self.batches.steps_for(tokens) for tokens in self.lengths.tokens}
        firsts = {first for first in firsts if first < self.steps}
        begun = [first for first in sorted(firsts) if not first or self._settings(first) != self._settings(first - 1)]
        yield from (range(begin, end) for begin, end in pairwise([*begun, self.steps]))

    def _settings(self, step: int) -> tuple[int, int]:
        return self.samples(step), self.length(step)


def resolve(key: str, span: float | str, steps: int, steps_for: Callable[[int], int]) -> int:
    """The number of steps that a part of a run takes.

    Args:
        key: the key that gave it, for errors.
        span: tokens as text with a unit, such as `2M`; a share of `steps` if below 1 (at least one step, unless it is
            0); else a whole number of steps.
        steps: length of the run in optimizer steps.
        steps_for: gives the number of steps that consume at least so many tokens: of the first steps for the warm-up,
            of the last steps for the decay.

    Raises:
        UsageError: `span` is none of these, or is longer than the run.
    """
    if isinstance(span, str):
        found = steps_for(parse_amount(span))
        shown, words = span, f" ({found:,} steps)"
    elif 0 <= span < 1:
        return max(1, round(steps * span)) if span else 0
    elif not (math.isfinite(span) and span > 0 and span == int(span)):
        raise UsageError(
            f"{key}={span:g}: give a share of the steps from 0 to below 1, a whole number of steps, or tokens such as "
            "2M"
        )
    else:
        found, shown, words = int(span), str(int(span)), ""
    if found > steps:
        raise UsageError(
            f"{key}={shown}: longer than the run of {steps:,} steps{words}; lower it, give it as a share (such as "
            "0.02), or train for more steps"
        )
    return found
