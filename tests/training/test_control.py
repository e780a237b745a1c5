"""Requests to stop: which reason counts, the deadline, and the end of a rank that has not begun."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from megazh.errors import INTERRUPTED, REQUEUE
from megazh.training.control import SIGNALS, Control, Reason


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put the handlers of signals back after each test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("numbers", list(itertools.permutations([signal.SIGUSR1, signal.SIGTERM, signal.SIGINT], 2)))
def test_of_several_signals_the_weightiest_counts(numbers: tuple[signal.Signals, ...]) -> None:
    control = Control()
    assert control.reason is Reason.NONE
    for number in numbers:
        os.kill(os.getpid(), number)
    assert control.reason is max(SIGNALS[number] for number in numbers)


def test_a_request_does_not_lose_one_that_interrupts_it() -> None:
    """As a signal handler does in the middle of it, and another thread."""
    control = Control()

    class Interrupted:
        def __index__(self) -> int:
            control.request(Reason.PERSON)
            return int(Reason.DEADLINE)

    control.request(Interrupted())  # type: ignore[arg-type]
    assert control.reason is Reason.PERSON


def test_only_a_scheduler_starts_again_what_a_scheduler_has_stopped() -> None:
    codes = {reason: reason.exit_code for reason in Reason if reason}
    by_machine = [Reason.DEADLINE, Reason.TIME_LIMIT, Reason.TERMINATED]
    assert {reason for reason, code in codes.items() if code == REQUEUE} == set(by_machine)
    assert {code for reason, code in codes.items() if reason not in by_machine} == {INTERRUPTED}
    assert max(by_machine) < min(set(codes) - set(by_machine)), "a person who stops a run has the last word"
    assert len({reason.text for reason in Reason}) == len(Reason)


def test_the_deadline_counts_from_the_start_of_the_attempt() -> None:
    control = Control()
    control.limit(None, 0.0)
    assert control.reason is Reason.NONE
    control.limit(2.0, time.time() - 7000)
    assert control.reason is Reason.NONE
    control.limit(2.0, time.time() - 7201)
    assert control.reason is Reason.DEADLINE
    control.request(Reason.COMMAND)
    assert control.reason is Reason.COMMAND


def test_a_clock_that_is_set_moves_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    control = Control()
    control.limit(1.0, time.time() - 60)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert control.reason is Reason.NONE


def test_nohup_keeps_sighup_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    control = Control()
    os.kill(os.getpid(), signal.SIGHUP)
    assert control.reason is Reason.NONE


STARTING = """
import ctypes, os, signal, sys, time
from megazh.training.control import Control
control = Control(lambda reason: os._exit(reason.exit_code))
if sys.argv[1] == "training":
    control.begin()
print("ready", flush=True)
if sys.argv[1] == "library":
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever: no signal interrupts it, and Python runs no handler
while not control.reason:
    time.sleep(0.01)
sys.exit(9)
"""


@pytest.mark.parametrize(
    ("where", "number", "code"),
    [("library", signal.SIGINT, 130), ("library", signal.SIGUSR1, 75), ("training", signal.SIGTERM, 9)],
)
def test_a_rank_that_has_not_begun_ends_at_once(where: str, number: signal.Signals, code: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", STARTING, where], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(5) == code
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
