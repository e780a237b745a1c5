"""Commands from another terminal (`megazh ctl`) to a run that trains: what each of them does, on all ranks together.

A thread of rank 0 looks for requests a few times a second, and says at once that one has been accepted. It is carried
out when the step ends: a flag in the reduction of the step tells all ranks that something waits, and only then rank 0
tells them what.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from megazh.errors import INTERRUPTED, DataError, MegazhError, UsageError
from megazh.model.sampling import SamplingOptions
from megazh.run.changes import Change
from megazh.run.lines import one_line
from megazh.run.pulse import beat
from megazh.run.requests import Answer, Command, Inbox, Outcome, Request
from megazh.run.state import State, StateFile
from megazh.training.checkpoint_list import checkpoint_path
from megazh.training.checks.course import NOTABLE
from megazh.training.collect import largest, of_rank_0
from megazh.training.control import Reason
from megazh.training.evaluate import SAMPLING
from megazh.training.live import LEARNING_RATE, changed, with_changes
from megazh.training.recipe import Recipe

if TYPE_CHECKING:
    from megazh.training.session import Session

_LOOK_SECONDS = 0.2
_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class _Order:
    """An accepted request, which waits to be carried out."""

    name: str
    """Name of the request's file."""
    request: Request
    changes: tuple[Change, ...] = ()
    """For `set`: all changes of the run, the new ones included. Empty before the request is checked, and for other
    commands."""


class Commands:
    """Carries out what `megazh ctl` asks of a session. All ranks make one.

    Args:
        session: the session.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._orders: deque[_Order] = deque()
        self._saves: list[tuple[str, int]] = []
        """Names of the `save` requests whose checkpoints are being written, with the steps of those."""
        self._open: set[str] = set()
        """Names of the accepted requests that have no last answer yet."""
        self._stop: str = ""
        """Name of the request to stop."""
        self._is_paused = False
        self._states = StateFile(session.folder, quiet=dist.get_rank() != 0)
        self._inbox: Inbox | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        """Held while a request is received, and while `close` answers: no request gets an answer after its last one."""
        if dist.get_rank() == 0:
            with contextlib.suppress(UsageError):  # which the command that started the ranks has warned of
                self._inbox = Inbox(session.folder)
                threading.Thread(target=self._listen, args=(self._inbox,), name="commands", daemon=True).start()

    @property
    def waiting(self) -> bool:
        """Whether this rank knows of a command that waits."""
        return bool(self._orders)

    def state(self, state: State) -> None:
        """Record what the run does from now on, for `megazh ctl RUN status`."""
        self._states.set(state)

    def during(self, state: State) -> AbstractContextManager[None]:
        """Record what the run does in the block, for `megazh ctl RUN status`."""
        return self._states.during(state)

    def carry_out(self) -> None:
        """Carry out the requests that wait; while the run is paused, wait for more. All ranks call it after a step.

        Raises:
            Interrupted: a rank was requested to stop; the current step is saved.
        """
        while True:
            order = of_rank_0(self._next())
            if order is not None:
                self._carry_out(order)
            elif self._is_paused:
                self._wait_for_command()
            else:
                return

    def settle(self) -> None:
        """Answer the `save` requests whose checkpoints are written by now, or could not be written."""
        if not self._saves:
            return
        saver, waiting = self._session.checkpoints.saver, self._saves
        self._saves = [each for each in waiting if each[1] == saver.step]
        for name, step in waiting:
            if step == saver.saved_at:
                path = checkpoint_path(self._session.folder.checkpoints, step)
                self._answer(name, Outcome.DONE, f"step {step:,} is saved: {path}", checkpoint=str(path))
            elif step != saver.step:
                self._answer(name, Outcome.REFUSED, saver.failure or f"step {step:,} was not saved")

    def close(self, stopped: Reason) -> None:
        """Answer everything that is not answered yet, and listen no longer.

        Args:
            stopped: why the run ends, where that is a request to stop that all ranks agree on, and the run is saved.
        """
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
            self.settle()
            session = self._session
            if self._stop and stopped is Reason.COMMAND:
                step = session.checkpoints.saver.saved_at
                saved = f"; step {step:,} is saved" if step else "; nothing to save"
                self._answer(self._stop, Outcome.DONE, f"stopped after step {session.step:,}{saved}")
            elif self._stop:
                why = f": {stopped.text}" if stopped else ""
                self._answer(self._stop, Outcome.ENDED, f"the run has ended first{why}")
            for name in list(self._open):
                self._answer(name, Outcome.ENDED, "the run has ended before that was done")

    # Rank 0 alone.

    def _listen(self, inbox: Inbox) -> None:
        """Take requests until the run ends; in a thread."""
        while not self._ended.wait(_LOOK_SECONDS):
            for name, request in inbox.take():
                with self._lock:
                    self._receive(name, request)

    def _receive(self, name: str, request: Request) -> None:
        control = self._session.control
        if self._ended.is_set():
            self._answer(name, Outcome.ENDED, "the run has ended")
            return
        if request.command is Command.STOP:
            if control.reason.exit_code == INTERRUPTED:
                self._answer(name, Outcome.REFUSED, "the run is stopping already")
                return
            self._answer(name, Outcome.ACCEPTED, "accepted: the run saves and ends after this step")
            self._stop = name
            control.request(
                Reason.COMMAND
            )  # outranks a scheduler's stop that is under way: nobody starts the run again
            return
        if control.reason:
            self._answer(name, Outcome.REFUSED, "the run is stopping")
            return
        if request.command is Command.SET:
            try:
                self._changed(request)  # now, not after a long step
            except MegazhError as error:
                self._answer(name, Outcome.REFUSED, str(error))
                return
            except Exception as error:  # a bug; the thread goes on, and so does the run
                self._answer(name, Outcome.REFUSED, one_line(f"failed: {type(error).__name__}: {error}"))
                return
        when = "" if self._is_paused else ": it is carried out when this step ends"
        self._answer(name, Outcome.ACCEPTED, f"accepted{when}")
        self._orders.append(_Order(name, request))

    def _answer(self, name: str, outcome: Outcome, text: str, **details: str | int | float | None) -> None:
        if outcome is Outcome.ACCEPTED:
            self._open.add(name)
        else:
            self._open.discard(name)
        if self._inbox is not None:
            self._inbox.answer(name, Answer(outcome=outcome, text=text, step=self._session.step, details=details))

    def _next(self) -> _Order | None:
        """The next command that makes sense; others are refused. None where none is left, and on other ranks."""
        while self._orders:
            order = self._orders.popleft()
            try:
                return self._checked(order)
            except MegazhError as error:
                self._answer(order.name, Outcome.REFUSED, str(error))
        return None

    def _checked(self, order: _Order) -> _Order:
        """A command that can be carried out. Raises MegazhError for another."""
        session, request = self._session, order.request
        match request.command:
            case Command.PAUSE if self._is_paused:
                raise UsageError("the run is paused already")
            case Command.RESUME if not self._is_paused:
                raise UsageError("the run is not paused")
            case Command.VALIDATE if session.held_out is None:
                raise UsageError("the run has no validation data: its manifest holds out nothing")
            case Command.SAVE if not session.step:
                raise UsageError("no step is done yet: there is nothing to save")
            case Command.SAMPLE:
                tokens = self._sample_tokens(request)
                return _Order(order.name, request.model_copy(update={"tokens": tokens}))
            case Command.SET:
                return self._checked_settings(order)
        return order

    def _checked_settings(self, order: _Order) -> _Order:
        """A `set` whose changes are recorded in run.json: a run that dies the moment after keeps them."""
        changes = self._changed(order.request)
        self._session.folder.set_changes(changes)
        return _Order(order.name, order.request, tuple(changes))

    def _changed(self, request: Request) -> list[Change]:
        """The changes of the run from now on. Raises UsageError where one cannot be made."""
        session = self._session
        if not request.settings:
            raise UsageError("set: expected key=value")
        changes = changed(session.recipe, session.live.changes, session.step, request.settings)
        self._check_samples(with_changes(session.recipe, changes))
        return changes

    def _check_samples(self, recipe: Recipe) -> None:
        """Check that the run's samples would work, where they change. Raises UsageError."""
        before, after, context = self._session.recipe.evaluation, recipe.evaluation, recipe.batch.seq_len
        if (before.sample_prompts, before.sample_tokens) == (after.sample_prompts, after.sample_tokens):
            return
        prompting = self._session.prompting
        for prompt in after.sample_prompts:
            if not prompting.tokenizer.encode(prompt):  # which a start refuses, also where a template adds tokens
                raise UsageError(
                    f"sample_prompts: {prompt!r} has no token to continue from; give at least one character"
                )
        for prompt in after.sample_prompts:
            length = len(prompting.ids(prompt))
            if length + after.sample_tokens > context:
                raise UsageError(
                    f"sample_prompts: {prompt!r} has {length:,} tokens, and with sample_tokens={after.sample_tokens} "
                    f"that is more than the {context:,} that the model is trained on: set less"
                )

    def _sample_tokens(self, request: Request) -> int:
        """Number of tokens to sample, as many as the context holds behind the text."""
        if not request.text:
            raise UsageError("sample: the text is empty")
        recipe = self._session.recipe
        length, context = len(self._session.prompting.ids(request.text)), recipe.batch.seq_len
        wanted = request.tokens or 1
        if not length:
            raise UsageError(f"sample: {request.text!r} has no token to continue from; give at least one character")
        if length + wanted > context:
            more = f" and -n {request.tokens}" if request.tokens else ""
            raise UsageError(
                f"sample: the text has {length:,} tokens{more}, and the model is trained on {context:,}: give less"
            )
        return request.tokens or min(recipe.evaluation.sample_tokens, context - length)

    # All ranks.

    def _carry_out(self, order: _Order) -> None:
        match order.request.command:
            case Command.SET:
                self._set(order)
            case Command.SAVE:
                self._save(order)
            case Command.VALIDATE:
                self._validate(order)
            case Command.SAMPLE:
                self._sample(order)
            case Command.PAUSE:
                self._pause(order)
            case Command.RESUME:
                self._resume(order)

    def _set(self, order: _Order) -> None:
        session = self._session
        before = session.recipe
        session.change(list(order.changes))
        texts = []
        for key in dict.fromkeys(each.key for each in order.changes):
            old, new = before.value(key), session.recipe.value(key)
            if old == new:
                continue
            text = f"{key} is {new} from step {session.step + 1:,} on (was {old})"
            if key == LEARNING_RATE:
                text += f"; the rate of that step is {session.rate(session.step):.3e}"
                if abs(new - old) > NOTABLE * max(old, new):
                    text = f"warning: the learning rate jumps: {text}"
            texts.append(text)
            session.metrics.event(session.step, "set", text, key=key, before=_scalar(old), value=_scalar(new))
        self._answer(order.name, Outcome.DONE, "; ".join(texts) or "nothing changes: the run has these values already")

    def _save(self, order: _Order) -> None:
        session = self._session
        self._event(f"save step {session.step}", order)
        if not session.checkpoints.saved_or_saving:
            session.checkpoints.save(wait=False)
        self._saves.append((order.name, session.step))
        self.settle()

    def _validate(self, order: _Order) -> None:
        session = self._session
        self._event(f"validate after step {session.step}", order)
        found = session.evaluations.validate()
        if found is None:
            text = f"step {session.step:,} was validated already; status shows its loss"
            self._answer(order.name, Outcome.DONE, text)
            return
        text = f"validation after step {session.step:,}: loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits/byte"
        self._answer(order.name, Outcome.DONE, text, loss=found.loss, bits_per_byte=found.bits_per_byte)

    def _sample(self, order: _Order) -> None:
        session, request = self._session, order.request
        assert request.text is not None
        assert request.tokens is not None
        self._event(f"sample after step {session.step}", order)
        options = SAMPLING
        if request.temperature is not None:
            options = SamplingOptions(request.temperature, SAMPLING.top_k, SAMPLING.top_p)
        try:
            text = session.evaluations.sample_once(request.text, request.tokens, request.seed, options)
        except (DataError, UsageError) as error:
            self._answer(order.name, Outcome.REFUSED, str(error))
            return
        self._answer(order.name, Outcome.DONE, text)

    def _pause(self, order: _Order) -> None:
        session = self._session
        self._is_paused = True
        self._paused_at = time.monotonic()
        text = f"paused after step {session.step:,}"
        session.metrics.event(session.step, "pause", f"{text} by 'megazh ctl'")
        self._answer(order.name, Outcome.DONE, f"{text}; resume goes on, stop saves and ends")

    def _resume(self, order: _Order) -> None:
        session = self._session
        self._is_paused = False
        seconds = time.monotonic() - self._paused_at
        text = f"training goes on after a pause of {seconds:.0f} s"
        session.metrics.event(session.step, "resume_training", text, seconds=round(seconds, 3))
        self._answer(order.name, Outcome.DONE, text)

    def _wait_for_command(self) -> None:
        """Wait in a pause until something is to be done; what is being saved goes on. Raises Interrupted."""
        session, saver = self._session, self._session.checkpoints.saver
        with self.during(State.PAUSED):
            while True:
                time.sleep(_PAUSE_SECONDS)
                beat("paused")
                stop, waiting, saving = largest(
                    [float(session.control.reason), float(self.waiting), float(saver.busy)], session.device
                )
                saver.poll(saving > 0)
                self.settle()
                if stop > 0:
                    session.interrupt()
                if waiting > 0:
                    return

    def _event(self, text: str, order: _Order) -> None:
        session = self._session
        session.metrics.event(session.step, "command", f"megazh ctl: {text}", command=order.request.command.value)


def _scalar(value: object) -> str | int | float | bool | None:
    """A value as an event holds it."""
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
