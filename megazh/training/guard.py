"""Guard of a run: decides before each update whether it is done, and when a run has diverged. One place for both.

A loss or a gradient norm that is not finite always skips the step. A **spike** is handled as `guard.spike` says. A step
spikes if both its loss and its gradient norm exceed the mean of the last W accepted steps by more than k standard
deviations (of the population) of the same steps:

    loss > mean(losses) + k * max(deviation(losses), FLOOR * |mean(losses)|), and norm likewise

W is `guard.window` and k `guard.deviations`. Steps that were skipped are not part of the window, and as long as fewer
than W steps are known nothing is a spike. FLOOR keeps rounding from being a spike where losses are all equal. The
window is emptied where batch size or segment length change, since losses jump there. It is kept where a person changes
the learning rate: if losses jump then, the rate is too high, and the guard shall act.

All ranks see the same numbers, and so decide the same. What the guard remembers is in each checkpoint (`GuardState`):
a resumed run decides as the uninterrupted one.
"""

import math
from collections import deque
from enum import IntEnum

from megazh.training.guard_state import GuardState
from megazh.training.recipe import GuardConfig, Spike

FLOOR = 1e-3
"""Smallest deviation that counts, relative to the mean."""
SKIPPED_LIMIT = 20
"""Number of steps in a row, skipped since numbers were not finite, after which a run has diverged."""


class Verdict(IntEnum):
    """Decision on a step. Ranks agree on the largest."""

    ACCEPTED = 0
    """Weights change."""
    SPIKE = 1
    """Loss and gradient norm spike; no weight changes."""
    NORM_NOT_FINITE = 2
    """No weight changes."""
    LOSS_NOT_FINITE = 3
    """No weight changes."""


class Guard:
    """The guard of one run, equal on all ranks.

    For each step: `begin_step`, then `accept` before the update, then `count` with what all ranks agreed on.

    Args:
        config: the recipe's settings.
        state: what the guard of the checkpoint remembered that the run goes on from. Default: nothing.
    """

    def __init__(self, config: GuardConfig, state: GuardState | None = None) -> None:
        self._config = config
        self._acts = config.spike is not Spike.IGNORE
        self._judged = (math.nan, math.nan)
        self._restore(state or GuardState())

    def _restore(self, state: GuardState) -> None:
        self.verdict = Verdict.ACCEPTED
        """This rank's decision on the last step, as `accept` made it; `count` replaces it by that of all ranks."""
        self.reason = ""
        """Why the last step was not accepted; empty if it was."""
        window = self._config.window
        self._losses, self._norms = deque(state.losses, window), deque(state.norms, window)
        self._batch = tuple(state.batch)
        self.skipped, self.skipped_in_row = state.skipped, state.skipped_in_row
        self._not_finite_in_row = state.not_finite_in_row
        self._spikes = list(state.spikes)
        self.rollbacks, self._undone, self.samples_passed = state.rollbacks, state.undone, state.samples_passed
        self.regular_step, self._returns = state.regular_step, state.returns

    def begin_step(self, *batch: int) -> None:
        """Name what a step's loss depends on (samples per step, tokens per segment); a change empties the window."""
        if batch != self._batch:
            self._batch = batch
            self._losses.clear()
            self._norms.clear()

    def accept(self, loss: float, norm: float) -> bool:
        """Decide on the update of a step; it is not counted yet.

        Args:
            loss: mean loss of the step over all ranks.
            norm: norm of the gradient of all weights, before clipping. Engines that give a negative norm for one that
                is not finite may pass it.
        """
        self.verdict, self.reason, self._judged = Verdict.ACCEPTED, "", (loss, norm)
        if not math.isfinite(loss):
            self.verdict, self.reason = Verdict.LOSS_NOT_FINITE, f"loss {loss:g} is not finite"
        elif not (math.isfinite(norm) and norm >= 0):
            self.verdict, self.reason = Verdict.NORM_NOT_FINITE, f"gradient norm {norm:g} is not finite"
        elif self._acts and len(self._losses) == self._config.window:
            above = _above(loss, self._losses)
            if above > self._config.deviations and (norm_above := _above(norm, self._norms)) > self._config.deviations:
                self.verdict = Verdict.SPIKE
                self.reason = (
                    f"loss {loss:.4g} and gradient norm {norm:.4g} exceed the means of the last "
                    f"{self._config.window} steps by {above:.1f} and {norm_above:.1f} deviations"
                )
        return self.verdict is Verdict.ACCEPTED

    def count(self, step: int, verdict: Verdict) -> None:
        """Count the step that `accept` has decided on, once all ranks agree on it.

        Args:
            step: number of the step, from 1.
            verdict: the largest of all ranks.
        """
        if verdict is not self.verdict:
            self.verdict, self.reason = verdict, f"a rank found {verdict.name.lower().replace('_', ' ')}"
        if verdict is Verdict.ACCEPTED:
            self._losses.append(self._judged[0])
            self._norms.append(self._judged[1])
            self.skipped_in_row = self._not_finite_in_row = 0
            return
        self.skipped += 1
        self.skipped_in_row += 1
        if verdict is Verdict.SPIKE:
            self._not_finite_in_row = 0
            taken = step + self._undone
            self._spikes = [at for at in self._spikes if taken - at < self._config.limit_steps] + [taken]
        else:
            self._not_finite_in_row += 1

    @property
    def judged(self) -> dict[str, float]:
        """Loss and gradient norm of the last step, as `accept` got them."""
        return dict(zip(("loss", "grad_norm"), self._judged, strict=True))

    @property
    def wants_rollback(self) -> bool:
        """Whether the last step was a spike, and the run is to go back to a checkpoint."""
        return self.verdict is Verdict.SPIKE and self._config.spike is Spike.ROLLBACK

    def note_regular_save(self, step: int) -> None:
        """Name the step of a checkpoint that is saved at an interval: rollbacks go there from now on."""
        self.regular_step, self._returns = step, 0

    def roll_back(self, saved: GuardState, steps: int, samples: int) -> None:
        """Become the guard of the checkpoint that the run has gone back to, but keep count of spikes and rollbacks.

        The checkpoint is to keep the new state from then on; see `rollback`. A run that is killed before takes the same
        steps again, and comes to the same state.

        Args:
            saved: what the guard remembered in the checkpoint.
            steps: steps that are undone: those since the checkpoint, the spike included.
            samples: samples of those steps.
        """
        spikes, rollbacks, undone, passed = self._spikes, self.rollbacks, self._undone, self.samples_passed
        returns = self._returns
        self._restore(saved)
        self._returns = returns + 1
        self._spikes, self.rollbacks, self._undone = spikes, rollbacks + 1, undone + steps
        self.samples_passed = passed + samples

    def fault(self, step: int, steps: int) -> str:
        """Why a run has diverged after the last step; empty if it has not.

        Args:
            step: optimizer steps done.
            steps: those of the whole run.
        """
        config, row = self._config, self.skipped_in_row
        if self._not_finite_in_row >= SKIPPED_LIMIT:
            return f"the last {self._not_finite_in_row} steps were skipped, since {self.reason}"
        if self.verdict is Verdict.SPIKE:
            if len(self._spikes) >= config.limit:
                return f"{self.reason}: spike {len(self._spikes)} within {config.limit_steps:,} steps; {self._remedy}"
            if self.wants_rollback and self._returns + 1 >= config.limit:
                return (
                    f"{self.reason}: spike {self._returns + 1} after the checkpoint of step {self.regular_step:,}, and "
                    f"none was saved at an interval since; {self._remedy}"
                )
        if step >= steps and row and (2 * row > steps or self.skipped >= steps):
            return f"{self.skipped} of {steps} steps were skipped, the last since {self.reason}"
        return ""

    @property
    def _remedy(self) -> str:
        return (
            f"raise guard.deviations, now {self._config.deviations:g}, or guard.limit, now {self._config.limit}, or "
            "set guard.spike=ignore"
        )

    @property
    def doubtful(self) -> bool:
        """Whether the loss of the last step was not finite: finite weights may be of no use."""
        return self.verdict is Verdict.LOSS_NOT_FINITE

    @property
    def state(self) -> GuardState:
        """What a checkpoint of this moment keeps."""
        return GuardState(
            losses=list(self._losses),
            norms=list(self._norms),
            batch=list(self._batch),
            skipped=self.skipped,
            skipped_in_row=self.skipped_in_row,
            not_finite_in_row=self._not_finite_in_row,
            spikes=self._spikes,
            rollbacks=self.rollbacks,
            undone=self._undone,
            samples_passed=self.samples_passed,
            regular_step=self.regular_step,
            returns=self._returns,
        )


def _above(value: float, window: deque[float]) -> float:
    """By how many deviations a value exceeds the mean of the window; negative below it."""
    mean = math.fsum(window) / len(window)
    deviation = math.dist(window, [mean] * len(window)) / math.sqrt(len(window))
    return (value - mean) / max(deviation, FLOOR * abs(mean), math.ulp(0.0))
