"""What the guard of a run remembers, as checkpoints keep it; without torch, so that listing them is quick."""

from typing import Annotated

from pydantic import Field

from megazh.config import Config

Whole = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class GuardState(Config):
    """State of a `megazh.training.guard.Guard`."""

    losses: list[Finite] = Field(default_factory=list)
    """Losses of the last steps that changed the weights, oldest first: the window."""
    norms: list[Finite] = Field(default_factory=list)
    """Gradient norms of the same steps."""
    batch: list[Whole] = Field(default_factory=list)
    """What the steps of the window have in common, see `Guard.begin_step`."""
    skipped: Whole = 0
    """Steps of the run that were skipped."""
    skipped_in_row: Whole = 0
    """Steps skipped since the last one that changed the weights."""
    not_finite_in_row: Whole = 0
    """The same, of those whose loss or norm was not finite."""
    spikes: list[Whole] = Field(default_factory=list)
    """Recent spikes, oldest first, each as the number of steps taken until then, those undone by rollbacks included."""
    rollbacks: Whole = 0
    """Times that the run went back to a checkpoint."""
    undone: Whole = 0
    """Steps that rollbacks undid."""
    samples_passed: Whole = 0
    """Samples of those steps: the run goes on with the data that comes after them."""
    regular_step: Whole | None = None
    """Step of the newest checkpoint that was saved at an interval, to which a rollback goes; None before the first."""
    returns: Whole = 0
    """Rollbacks to that checkpoint."""
