"""The course of a run, beside plain loops over its steps; the learning rate at the edges of its schedule."""

import math
import random
from itertools import pairwise
from typing import Any

import pytest
from recipes import make_recipe

from megazh.errors import UsageError
from megazh.index.choices import Cut
from megazh.training.course import Batches, Course, Kind, Lengths, Schedule, resolve


def course(**schedule: Any) -> Course:
    """The course of the small recipe, of 8 samples of 16 tokens per step, with other keys of its schedule."""
    return make_recipe(**{f"schedule.{key}": value for key, value in schedule.items()}).course


def test_batches_and_lengths_are_those_of_a_loop_over_steps() -> None:
    draw = random.Random(0)
    for _ in range(200):
        seq_len = draw.choice([2, 7, 64])
        keys = [0, *sorted(draw.sample(range(1, 5000), draw.randint(0, 4)))]
        sizes = {key: draw.randint(1, 40) for key in keys}
        batches, samples = Batches(sizes, seq_len), 0
        for step in range(400):
            tokens = samples * seq_len
            size = sizes[max(key for key in keys if key <= tokens)]
            assert (batches.size(step), batches.samples_before(step)) == (size, samples)
            assert batches.step_of(samples) == batches.step_of(samples + size - 1) == step
            samples += size
        for tokens in draw.sample(range(1, samples * seq_len), 20):
            steps = batches.steps_for(tokens)
            assert batches.samples_before(steps) * seq_len >= tokens > batches.samples_before(steps - 1) * seq_len


def test_a_course_with_batches_and_lengths() -> None:
    """Two steps of 128 tokens, then steps of 256; segments grow at tokens that lie inside of a step."""
    found = course(batch={0: 8, "0.25K": 16}, length={0: 4, 300: 8, 600: 16}, tokens=1000, steps=None)
    assert (found.steps, found.total_tokens, found.sizes()) == (5, 1024, [8, 16])
    assert [found.tokens(step) for step in range(5)] == [128, 128, 256, 256, 256]
    assert [found.tokens_before(step) for step in range(6)] == [0, 128, 256, 512, 768, 1024]
    assert [found.length(step) for step in range(5)] == [4, 4, 4, 8, 16]
    assert list(found.parts()) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    assert [found.cut_of(sample) for sample in (0, 31, 32, 48)] == [Cut(4), Cut(4), Cut(8), None]
    assert [found.steps_within(tokens) for tokens in (0, 127, 128, 600, 768.5)] == [0, 0, 1, 3, 4]
    assert course(length={0: 4}, label_at_cut=False).cut_of(0) == Cut(4, False)


def test_a_size_that_its_run_does_not_reach_is_none_of_its_sizes() -> None:
    found = course(batch={0: 8, "1M": 16})
    assert (found.sizes(), list(found.parts())) == ([8], [range(10)])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("batch", {1: 8}, "schedule.batch: expected a size from 0 tokens on"),
        ("batch", {0: 8, 9: 0}, "schedule.batch: 0 samples: expected at least 1"),
        (
            "batch",
            {0: 4, "1K": 8},
            "schedule.batch begins with 4 samples, and batch.global_batch_size is 8; set global",
        ),
        ("batch", {0: 8, "1K": 2, 1000: 4}, "'schedule.batch': 1000 is given twice"),
        ("batch", {0: 8, "many": 2}, "'schedule.batch': expected a number such as 1500000"),
        ("batch", {0: 8.5}, "'schedule.batch': 0: expected a whole number, found 8.5"),
        ("batch", 8, "'schedule.batch': expected numbers by tokens, such as {0: 128, 2B: 256}, found 8"),
        ("batch", {"0:16": None, "100K:32": None}, "0:16: write a blank after the colon, as in {0: 128, 2B: 256}"),
        ("batch", "100K:32", "{0: 128, 2B: 256} (on the command line, in quotes), found '100K:32'"),
        ("length", {5: 8}, "schedule.length: expected a length from 0 tokens on"),
        ("length", {0: 32}, "schedule.length: 32 tokens: expected 2 to batch.seq_len=16"),
        ("length", {0: 1}, "schedule.length: 1 tokens: expected 2"),
        ("warmup", -1, "'schedule.warmup': expected steps, tokens such as 2M, or a share below 1, found -1"),
        ("warmup", True, "'schedule.warmup': expected steps"),
        ("decay", "12", "'schedule.decay': expected steps"),
        ("decay", "12X", "'schedule.decay': expected a number such as"),
        ("kind", "wds", "'schedule.kind': expected one of cosine, wsd, linear, constant, inverse_sqrt"),
    ],
)
def test_values_that_cannot_work_are_refused_on_one_line(key: str, value: Any, words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        course(**{key: value})
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_one_accumulation_for_several_sizes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"several sizes, .*; leave batch\.gradient_accumulation_steps out"):
        make_recipe(gradient_accumulation_steps=4, **{"schedule.batch": {0: 8, 100: 16}})


def test_values_at_the_edges() -> None:
    rate = Schedule(Kind.COSINE, 8e-4, 101, 11, 0.1).rate
    assert rate(0) == pytest.approx(8e-4 / 11, rel=1e-12)
    assert rate(9) == pytest.approx(8e-4 * 10 / 11, rel=1e-12)
    assert rate(10) == 8e-4
    assert rate(11) == pytest.approx(8e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi / 90)) / 2), rel=1e-12)
    assert rate(55) == pytest.approx(8e-4 * 0.55, rel=1e-12)  # half-way down
    assert rate(100) == pytest.approx(8e-5, rel=1e-12)
    assert rate(101) == rate(5000) == rate(100)


@pytest.mark.parametrize("warmup", [0, 1, 7, 39, 40])
@pytest.mark.parametrize("kind", [Kind.COSINE, Kind.LINEAR])
def test_rises_to_the_peak_once_and_falls(kind: Kind, warmup: int) -> None:
    rates = [Schedule(kind, 1.0, 40, warmup, 0.0).rate(step) for step in range(40)]
    top = max(warmup - 1, 0)
    assert rates[top] == 1.0
    assert all(before < after for before, after in pairwise(rates[: top + 1]))
    assert all(before > after for before, after in pairwise(rates[top:]))
    if top < 39:
        assert rates[-1] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("kind", list(Kind))
def test_a_run_of_one_step_is_at_the_peak(kind: Kind, warmup: int) -> None:
    assert Schedule(kind, 3e-4, 1, warmup, 0.1).rate(0) == 3e-4


def test_min_ratio_of_one_holds_the_peak() -> None:
    assert {Schedule(Kind.COSINE, 2e-4, 20, 0, 1.0).rate(step) for step in range(20)} == {2e-4}


def test_shapes_behind_the_warm_up() -> None:
    rates = {kind: [Schedule(kind, 1.0, 101, 11, 0.1, 20).rate(step) for step in range(101)] for kind in Kind}
    for kind, found in rates.items():
        assert found[10] == 1.0, kind
        assert found[0] == pytest.approx(1 / 11)
        assert all(a >= b for a, b in pairwise(found[10:])), kind
    assert rates[Kind.CONSTANT][100] == 1.0
    assert rates[Kind.WSD][80] == 1.0 > rates[Kind.WSD][81]
    assert rates[Kind.WSD][90] == pytest.approx(0.55)
    assert rates[Kind.LINEAR][55] == pytest.approx(0.55)
    assert rates[Kind.INVERSE_SQRT][43] == pytest.approx(0.5)
    assert all(rates[kind][100] == pytest.approx(0.1) for kind in (Kind.COSINE, Kind.WSD, Kind.LINEAR))


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (0, 0),
        (0.0, 0),
        (0.02, 12),
        (0.0001, 1),
        (0.999, 599),
        (1, 1),
        (50.0, 50),
        (600, 600),
        ("2K", 8),
        ("2.5K", 9),
        ("303K", 596),
    ],
)
def test_a_span_as_share_steps_or_tokens(span: float | str, expected: int) -> None:
    """Eight steps have 256 tokens, together 2048; later ones have 512."""
    assert resolve("schedule.warmup", span, 600, Batches({0: 4, 2000: 8}, 64).steps_for) == expected


def test_a_share_of_one_step_is_one_step() -> None:
    assert resolve("schedule.warmup", 0.5, 1, Batches({0: 1}, 2).steps_for) == 1


@pytest.mark.parametrize(
    ("decay", "steps"), [("0.25K", 1), ("0.3K", 2), ("0.5K", 2), ("0.6K", 3), ("0.768K", 4), ("1K", 6)]
)
def test_a_decay_in_tokens_is_counted_from_the_end(decay: str, steps: int) -> None:
    """Four steps of 128 tokens, then two of 256."""
    found = course(batch={0: 8, 512: 16}, steps=6, kind="wsd", decay=decay, warmup=0).schedule
    assert found.decay == steps
    with pytest.raises(UsageError, match=r"schedule\.decay=1025K: longer than the run of 6 steps"):
        _ = course(batch={0: 8, 512: 16}, steps=6, kind="wsd", decay="1025K", warmup=0).schedule


def test_a_warm_up_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(UsageError, match=r"schedule\.warmup=11: longer than the run of 10"):
        _ = course(warmup=11).schedule
    with pytest.raises(UsageError, match=r"schedule\.warmup=2M: longer than the run of 10 steps \(15,625 steps\)"):
        _ = course(warmup="2M").schedule
    with pytest.raises(UsageError, match=r"decay=0\.8: 3 steps of warm-up and 8 of decay are more than the run's 10"):
        _ = course(kind="wsd", warmup=3, decay=0.8).schedule
    for wrong in (1.5, math.inf):
        with pytest.raises(UsageError, match="share of the steps"):
            _ = course(warmup=wrong).schedule


def test_lengths_by_tokens() -> None:
    lengths = Lengths({0: 64, 1000: 128, 3000: 1024}, 1024)
    assert [lengths.at(tokens) for tokens in (0, 999, 1000, 2999, 3000, 10**9)] == [64, 64, 128, 128, 1024, 1024]
