"""Ranks that are slower than the others for long are named, and only they."""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from megazh.training.layout import Layout
from megazh.training.slow_ranks import IN_ROW, MEASURED, SlowRanks


def layout(stages: int, replicas: int) -> Layout:
    return Layout(stages * replicas, stages, replicas, micro_batch_size=1, micro_batches=4)


def compare(ranks: SlowRanks, *rows: list[float], kind: object = None) -> list[tuple[list[int], list[int]]]:
    """Numbers of the ranks that are named, and that are slow no longer, at each comparison."""
    found = []
    for row in rows:
        slow, over = ranks.compare(row, kind)
        found.append(([each.rank for each in slow], over))
    return found


NOTHING: tuple[list[int], list[int]] = ([], [])


def test_a_rank_is_named_once_and_again_when_it_is_slow_no_longer() -> None:
    ranks = SlowRanks(50, layout(2, 3))
    even, slow = [1.0, 1.02, 0.98, 5, 5, 5], [1.0, 1.15, 0.98, 5, 5, 5]
    assert compare(ranks, [9.0, 1, 1, 1, 1, 1]) == [NOTHING], "the first comparison of an attempt counts for nothing"
    assert compare(ranks, even, slow, slow) == [NOTHING] * 3
    assert ranks.suspects
    assert compare(ranks, slow) == [([1], [])]
    assert not ranks.suspects
    assert compare(ranks, slow, slow, even, even, even, even) == [*[NOTHING] * 4, ([], [1]), NOTHING]


def test_a_rank_that_is_slow_now_and_then_is_not_named() -> None:
    ranks, even, slow = SlowRanks(50, layout(1, 4)), [1.0, 1, 1, 1], [1.0, 1, 2, 1]
    assert compare(ranks, *[even, *([slow] * (IN_ROW - 1)), even] * 5) == [NOTHING] * 5 * (IN_ROW + 1)


def test_of_two_replicas_the_slower_one_is_compared_with_the_other() -> None:
    ranks = SlowRanks(50, layout(1, 2))
    slow, _ = [ranks.compare([1.0, 1.11], None) for _ in range(IN_ROW + 1)][-1]
    assert [(each.rank, each.usual, round(each.excess, 2)) for each in slow] == [(1, 1.0, 0.11)]


def test_a_rank_that_is_alone_in_its_stage_is_compared_with_its_past() -> None:
    ranks, before = SlowRanks(50, layout(3, 1)), [1.0, 2.0, 4.0]
    assert compare(ranks, *[before] * 10) == [NOTHING] * 10, "stages need not be equal"
    assert compare(ranks, *[[1.3, 2.6, 5.2]] * IN_ROW) == [NOTHING] * IN_ROW, "all are slower alike"
    assert compare(ranks, *[[1.3, 2.6, 6.0]] * IN_ROW) == [*[NOTHING] * (IN_ROW - 1), ([2], [])]


def test_steps_of_another_size_begin_a_new_past() -> None:
    ranks = SlowRanks(50, layout(2, 1))
    compare(ranks, *[[1.0, 2.0]] * 10, kind=(8, 64))
    assert compare(ranks, *[[2.0, 6.0]] * 10, kind=(16, 64)) == [NOTHING] * 10


def test_a_stage_that_becomes_faster_makes_no_other_one_slow() -> None:
    ranks = SlowRanks(50, layout(2, 1))
    assert compare(ranks, *[[1.0, 2.0]] * 10, *[[0.8, 2.0]] * 10) == [NOTHING] * 20


def test_a_rank_that_was_named_is_not_fast_where_nothing_is_compared() -> None:
    ranks = SlowRanks(50, layout(2, 1))
    compare(ranks, *[[1.0, 2.0]] * 10, kind=(8, 64))
    assert compare(ranks, *[[1.0, 2.6]] * IN_ROW, kind=(8, 64))[-1] == ([1], [])
    assert compare(ranks, *[[2.0, 5.2]] * 5, kind=(16, 64)) == [NOTHING] * 5


def test_the_fastest_of_the_last_steps_is_shared() -> None:
    ranks = SlowRanks(10, layout(1, 3))
    assert [step for step in range(1, 21) if ranks.measures(step)] == [6, 7, 8, 9, 10, 16, 17, 18, 19, 20]
    assert MEASURED == 5
    shared = [ranks.shared(step, 1, float(step) if ranks.measures(step) else 0.0) for step in range(1, 11)]
    assert shared == [*[[]] * 9, [0.0, 6.0, 0.0]]


@pytest.mark.parametrize("ranks", [SlowRanks(0, layout(1, 4)), SlowRanks(50, layout(1, 1))])
def test_without_comparisons_nothing_is_timed(ranks: SlowRanks) -> None:
    assert not any(ranks.measures(step) for step in range(1, 200))
    assert ranks.shared(50, 0, 0.0) == []


@pytest.fixture(scope="module")
def found(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Events about slow ranks of several runs of two ranks."""
    script = Path(__file__).parent / "slow_rank.py"
    return run_ranks(script, 2, [stories], tmp_path_factory.mktemp("slow"), timeout=150)[0]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("run", "step", "than"),
    [
        ("replicas", 16, "than the other ranks of its stage ("),
        ("stages", 36, "than itself before, in proportion to the other stages ("),
        ("hf", 16, "than the other ranks of its stage ("),
    ],
)
def test_a_rank_that_is_slowed_is_named(found: dict[str, Any], run: str, step: int, than: str) -> None:
    ((at, name, rank, text),) = found[run]
    assert (at, name, rank) == (step, "slow_rank", 1)
    place = "stage 1, replica 0" if run == "stages" else "stage 0, replica 1"
    assert text.startswith(f"rank 1 ({place}) is slow: it computes ")
    assert than in text
    assert "cores that it may use" in text


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_ranks_of_an_even_run_are_not_named(found: dict[str, Any]) -> None:
    assert found["even"] == []
