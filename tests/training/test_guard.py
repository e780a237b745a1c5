"""The guard's decisions on series of losses and norms."""

import math
import random
from collections.abc import Iterable

import pytest
from recipes import make_recipe

from megazh.errors import UsageError
from megazh.training.guard import FLOOR, SKIPPED_LIMIT, Guard, Verdict
from megazh.training.guard_state import GuardState
from megazh.training.recipe import GuardConfig, Spike

WINDOW, DEVIATIONS = 8, 3.0
CONFIG = GuardConfig(window=WINDOW, deviations=DEVIATIONS, limit=3, limit_steps=20)
LOSSES = [2.0, 2.2, 1.8, 2.1, 1.9, 2.0, 2.05, 1.95]
NORMS = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.0]


def feed(guard: Guard, steps: Iterable[tuple[float, float]], first: int = 1) -> list[Verdict]:
    """Let the guard decide on steps, which all ranks agree on; returns its decisions."""
    found = []
    for step, (loss, norm) in enumerate(steps, first):
        assert guard.accept(loss, norm) is (guard.verdict is Verdict.ACCEPTED)
        guard.count(step, guard.verdict)
        found.append(guard.verdict)
    return found


def full(config: GuardConfig = CONFIG) -> Guard:
    """A guard that knows a window of steps."""
    guard = Guard(config)
    assert feed(guard, zip(LOSSES, NORMS, strict=True)) == [Verdict.ACCEPTED] * WINDOW
    return guard


def bounds() -> tuple[float, float]:
    """Loss and norm above which a step behind `full` spikes, by the definition."""

    def bound(values: list[float]) -> float:
        mean = sum(values) / WINDOW
        return mean + DEVIATIONS * math.sqrt(sum((value - mean) ** 2 for value in values) / WINDOW)

    return bound(LOSSES), bound(NORMS)


def test_a_spike_exceeds_both_bounds() -> None:
    loss, norm = bounds()
    guard, up, down = full(), 1 + 1e-9, 1 - 1e-9
    assert guard.accept(loss * down, 100.0)
    assert guard.accept(100.0, norm * down)
    assert guard.accept(-100.0, 0.0)
    assert not guard.accept(loss * up, norm * up)
    assert guard.verdict is Verdict.SPIKE
    assert guard.reason == (
        f"loss {loss:.4g} and gradient norm {norm:.4g} exceed the means of the last 8 steps by 3.0 and 3.0 deviations"
    )


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    guard = Guard(CONFIG)
    assert feed(guard, [(1.0, 1.0)] * (WINDOW - 1) + [(1e9, 1e9)]) == [Verdict.ACCEPTED] * WINDOW
    assert feed(full(), [(1e9, 1e9)]) == [Verdict.SPIKE]


@pytest.mark.parametrize(("loss", "norm", "verdict"), [
    (math.nan, 1.0, Verdict.LOSS_NOT_FINITE), (math.inf, 1.0, Verdict.LOSS_NOT_FINITE),
    (-math.inf, math.nan, Verdict.LOSS_NOT_FINITE), (2.0, math.nan, Verdict.NORM_NOT_FINITE),
    (2.0, math.inf, Verdict.NORM_NOT_FINITE), (2.0, -1.0, Verdict.NORM_NOT_FINITE),
])  # fmt: skip
@pytest.mark.parametrize("spike", list(Spike))
def test_what_is_not_finite_is_skipped_at_once_and_whatever_is_set(
    loss: float, norm: float, verdict: Verdict, spike: Spike
) -> None:
    guard = Guard(GuardConfig(spike=spike))
    assert feed(guard, [(loss, norm)]) == [verdict]
    assert "is not finite" in guard.reason
    assert (guard.skipped, guard.skipped_in_row, guard.wants_rollback) == (1, 1, False)
    assert guard.doubtful is (verdict is Verdict.LOSS_NOT_FINITE)


def test_equal_losses_leave_room_for_rounding() -> None:
    guard = Guard(CONFIG)
    feed(guard, [(2.0, 1.0)] * WINDOW)
    room = DEVIATIONS * FLOOR
    assert guard.accept(2.0 * (1 + room * 0.99), 9.0)
    assert guard.accept(9.0, 1.0 + room * 0.99)
    assert not guard.accept(2.0 * (1 + room * 1.01), 1.0 + room * 1.01)
    zero = Guard(CONFIG)
    feed(zero, [(0.0, 0.0)] * WINDOW)
    assert zero.accept(0.0, 0.0)
    assert not zero.accept(1e-3, 1e-3)


def test_skipped_steps_do_not_enter_the_window() -> None:
    guard = full()
    before = guard.state
    assert feed(guard, [(50.0, 50.0), (math.nan, 1.0), (50.0, 50.0)], WINDOW + 1) == [
        Verdict.SPIKE, Verdict.LOSS_NOT_FINITE, Verdict.SPIKE
    ]  # fmt: skip
    assert (guard.state.losses, guard.state.norms) == (before.losses, before.norms)
    assert (guard.skipped, guard.skipped_in_row) == (3, 3)
    assert guard.state.spikes == [9, 11]
    feed(guard, [(2.1, 1.1)], WINDOW + 4)
    assert (guard.state.losses, guard.skipped, guard.skipped_in_row) == ([*LOSSES[1:], 2.1], 3, 0)


def test_spikes_are_taken_where_they_are_ignored() -> None:
    guard = full(CONFIG.model_copy(update={"spike": Spike.IGNORE}))
    assert feed(guard, [(1e9, 1e9)]) == [Verdict.ACCEPTED]


def test_another_batch_or_length_empties_the_window() -> None:
    guard = full()
    guard.begin_step(8, 64)
    assert feed(guard, zip(LOSSES, NORMS, strict=True)) == [Verdict.ACCEPTED] * WINDOW
    guard.begin_step(8, 64)
    assert not guard.accept(50.0, 50.0)
    guard.begin_step(16, 64)
    assert guard.accept(50.0, 50.0)


def test_a_resumed_guard_decides_as_the_one_before() -> None:
    """Cut anywhere, and through the text of a manifest."""
    random_ = random.Random(5)
    steps = [(random_.gauss(2, 0.1) + 4 * (at % 17 == 16), random_.gauss(1, 0.1) + 4 * (at % 17 == 16))
             for at in range(80)]  # fmt: skip
    steps[40] = (math.nan, 1.0)
    whole = Guard(CONFIG)
    verdicts = feed(whole, steps)
    assert verdicts.count(Verdict.SPIKE) == 4
    for cut in range(0, 80, 7):
        first = Guard(CONFIG)
        feed(first, steps[:cut])
        state = GuardState.model_validate_json(first.state.model_dump_json())
        second = Guard(CONFIG, state)
        assert feed(second, steps[cut:], cut + 1) == verdicts[cut:]
        assert second.state == whole.state


def test_too_many_spikes_end_the_run() -> None:
    guard = full()
    for number, step in enumerate((10, 29, 30), 1):  # the first is 20 steps before the last
        feed(guard, [(50.0, 50.0)], step)
        assert guard.fault(step, 100) == ""
        assert len(guard.state.spikes) == min(number, 2)
    feed(guard, [(2.0, 1.0)], 31)
    feed(guard, [(50.0, 50.0)], 32)
    fault = guard.fault(32, 100)
    assert fault.startswith("loss 50 and gradient norm 50 exceed the means of the last 8 steps by ")
    assert fault.endswith(
        ": spike 3 within 20 steps; raise guard.deviations, now 3, or guard.limit, now 3, or set guard.spike=ignore"
    )
    feed(guard, [(2.0, 1.0)], 33)
    assert guard.fault(33, 100) == "", "a step that is accepted is no reason to end"


def test_too_many_in_a_row_that_are_not_finite_end_the_run() -> None:
    guard = full()
    feed(guard, [(2.0, math.nan)] * (SKIPPED_LIMIT - 1))
    assert guard.fault(30, 1000) == ""
    feed(guard, [(2.0, 1.0)])
    feed(guard, [(2.0, math.nan)] * SKIPPED_LIMIT)
    assert guard.fault(50, 1000) == "the last 20 steps were skipped, since gradient norm nan is not finite"


def test_a_run_of_which_most_was_skipped_at_its_end_has_diverged() -> None:
    guard = Guard(CONFIG)
    feed(guard, [(2.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (math.nan, 1.0)])
    assert guard.fault(4, 4) == ""
    guard = Guard(CONFIG)
    feed(guard, [(2.0, 1.0), (math.nan, 1.0), (math.nan, 1.0), (math.nan, 1.0)])
    assert guard.fault(3, 4) == ""
    assert guard.fault(4, 4) == "3 of 4 steps were skipped, the last since loss nan is not finite"


def test_the_largest_verdict_of_all_ranks_counts() -> None:
    guard = full()
    assert guard.accept(2.0, 1.0)
    guard.count(9, Verdict.NORM_NOT_FINITE)
    assert (guard.verdict, guard.skipped) == (Verdict.NORM_NOT_FINITE, 1)
    assert guard.reason == "a rank found norm not finite"
    assert guard.state.losses == LOSSES


def test_a_rollback_keeps_its_counts_and_comes_to_the_same_state_after_a_crash() -> None:
    config = CONFIG.model_copy(update={"spike": Spike.ROLLBACK})
    guard = full(config)
    guard.note_regular_save(8)
    saved = guard.state

    def to_the_spike(guard: Guard) -> Guard:
        assert feed(guard, [(2.0, 1.0), (math.nan, 1.0), (50.0, 50.0)], 9)[-1] is Verdict.SPIKE
        assert guard.wants_rollback
        guard.roll_back(saved, 3, 24)
        return guard

    state = to_the_spike(guard).state
    assert to_the_spike(Guard(config, saved)).state == state
    assert (state.losses, state.skipped, state.skipped_in_row) == (LOSSES, 0, 0)
    assert (state.rollbacks, state.undone, state.samples_passed, state.spikes) == (1, 3, 24, [11])
    assert Guard(config, state).state == state, "the checkpoint keeps it then"
    assert not guard.wants_rollback
    to_the_spike(guard)  # again from the same checkpoint
    assert (guard.rollbacks, guard.samples_passed, guard.state.spikes) == (2, 48, [11, 14])
    feed(guard, [(50.0, 50.0)], 9)
    assert "spike 3 within 20 steps" in guard.fault(9, 100)


def test_rollbacks_to_one_checkpoint_end_however_far_apart() -> None:
    """Each spike comes more than `limit_steps` after the one before."""
    config = CONFIG.model_copy(update={"spike": Spike.ROLLBACK})
    guard = full(config)
    spike, far = [(2.0, 1.0), (50.0, 50.0)], 8 + 10 * config.limit_steps

    def back(guard: Guard, saved: GuardState) -> Guard:
        feed(guard, spike, far)
        assert guard.wants_rollback
        assert guard.fault(far + 1, 10_000) == ""
        guard.roll_back(saved, far - 8, 8)
        return Guard(config, guard.state)  # as a resume from there

    guard.note_regular_save(8)
    saved = guard.state
    guard = back(back(guard, saved), saved)
    feed(guard, spike, far)
    fault = guard.fault(far + 1, 10_000)
    assert fault.startswith("loss 50 and gradient norm 50 exceed the means of the last 8 steps by ")
    assert fault.endswith(
        ": spike 3 after the checkpoint of step 8, and none was saved at an interval since; raise guard.deviations, "
        "now 3, or guard.limit, now 3, or set guard.spike=ignore"
    )
    guard = Guard(config, saved)
    for _ in range(5):  # no end where each rollback is followed by a checkpoint
        guard = back(guard, saved)
        guard.note_regular_save(9)
        saved = guard.state


def test_a_rollback_needs_checkpoints() -> None:
    with pytest.raises(UsageError, match=r"guard\.spike=rollback goes back to checkpoints, and checkpoint_every=0"):
        make_recipe(spike="rollback", checkpoint_every=0)
    assert make_recipe(spike="rollback").guard.spike is Spike.ROLLBACK
