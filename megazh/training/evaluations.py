"""Validations and sampled continuations of a run, as far as each is due and not done."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from megazh.errors import DataError, UsageError
from megazh.model.sampling import SamplingOptions
from megazh.run.metrics import VALIDATION, sample_of
from megazh.run.state import State
from megazh.training.collect import of_rank_0
from megazh.training.evaluate import SAMPLING
from megazh.training.held_out import Validation
from megazh.training.pace import due

if TYPE_CHECKING:
    from megazh.training.session import Session


class Evaluations:
    """Validates and samples with the engine of a session. All ranks make one, and call its methods in the same order.

    Args:
        session: the session.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.done: set[str] = set()
        """Evaluations that are done for the current step: `VALIDATION`, and `sample_of` each prompt."""

    def look_up(self) -> None:
        """Learn what is recorded for the current step, by an earlier attempt or before a rollback."""
        self.done = of_rank_0(self._session.metrics.evaluated_at(self._session.step))

    def evaluate(self) -> None:
        """Validate and sample, as far as each is due now and not done.

        Raises:
            Interrupted: a rank was requested to stop; the current step is saved.
        """
        session, every = self._session, self._session.recipe.evaluation
        if session.step == 0 or session.last or due(every.validate_every, session.step):
            self.validate()
        if session.step and (session.last or due(every.sample_every, session.step)):
            self.sample()

    def validate(self) -> Validation | None:
        """Validate, unless that is done for this step; None then, and without held-out documents."""
        session = self._session
        if session.held_out is None or VALIDATION in self.done:
            return None
        with session.commands.during(State.VALIDATING):
            found = session.compute_validation(session.held_out)
        if found is None:
            session.interrupt()
        tokens, size = session.course.tokens_before(session.step), session.held_out.samples
        session.metrics.validation(session.step, tokens, found.loss, found.bits_per_byte, size, found.corpora)
        session.checkpoints.note_validation(found.loss)
        self.done.add(VALIDATION)
        return found

    def sample(self) -> None:
        """Sample a continuation of each prompt that has none at this step."""
        session, evaluation = self._session, self._session.recipe.evaluation
        for number, prompt in enumerate(evaluation.sample_prompts):
            if sample_of(prompt) in self.done:
                continue
            seed = hash_seed(session.recipe.schedule.seed, session.step, number)
            try:
                self.sample_once(prompt, evaluation.sample_tokens, seed)
            except (DataError, UsageError) as error:  # the run needs no sample, and logits may become finite again
                session.log(f"no sample after step {session.step}: {error}")
                session.metrics.sample(session.step, prompt, "")
            self.done.add(sample_of(prompt))

    def sample_once(self, prompt: str, tokens: int, seed: int, options: SamplingOptions = SAMPLING) -> str:
        """Continue a prompt by up to `tokens` tokens, and record it.

        Raises:
            DataError: the logits are not finite.
            UsageError: the prompt has no token.
            Interrupted: a rank was requested to stop; the current step is saved.
        """
        session = self._session
        text: str | None = ""
        failure: DataError | UsageError | None = None
        with session.commands.during(State.SAMPLING):
            try:
                text = session.generate(prompt, tokens, seed, options)
            except (DataError, UsageError) as error:
                failure = error
        # Replicas draw for themselves, so a rank may know of the request that others have not seen yet.
        if session.stop_is_agreed() or text is None:
            session.interrupt()
        if failure is not None:
            raise failure
        session.metrics.sample(session.step, prompt, text)
        return text


def hash_seed(*parts: int) -> int:
    """Derive a 63-bit seed from some numbers; the same on every machine."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
