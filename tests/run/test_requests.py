"""Requests to a run and its answers, as files: taken once, strictly read, and only those of this user."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import wait_until

from megazh.errors import BusyError, DataError, UsageError, WorkerError
from megazh.files import locked
from megazh.run.folder import RunFolder
from megazh.run.requests import Answer, Command, Inbox, Outcome, Request, ask, read_private

NAME = f"{1:019d}-{'0' * 32}.json"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    """A run folder whose lock is held, as by a run that is running."""
    folder = RunFolder(tmp_path / "run")
    with locked(folder.lock, "in use"):
        Inbox.clear(folder)
        yield folder


def put(run: RunFolder, text: str | bytes, name: str = NAME) -> Path:
    """Write a request file."""
    path = run.control / "requests" / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def answers(run: RunFolder) -> list[Answer]:
    """All answers that are there."""
    return [read_private(path, Answer) for path in sorted((run.control / "answers").iterdir())]


class Serving:
    """A thread that answers each request with `outcomes`, one after the other."""

    def __init__(self, run: RunFolder, *outcomes: Answer) -> None:
        self.taken: list[Request] = []
        self._inbox, self._outcomes, self._ended = Inbox(run), outcomes, False
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "Serving":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()

    def _serve(self) -> None:
        while not self._ended:
            for name, request in self._inbox.take():
                self.taken.append(request)
                for outcome in self._outcomes:
                    self._inbox.answer(name, outcome)
                    time.sleep(0.15)
            time.sleep(0.01)


def test_a_request_is_accepted_and_then_answered(run: RunFolder) -> None:
    done = Answer(outcome=Outcome.DONE, text="小狗\n跑", step=3, details={"loss": 1.5})
    accepted: list[Answer] = []
    request = Request(command=Command.SAMPLE, text="从前", tokens=4)
    with Serving(run, Answer(outcome=Outcome.ACCEPTED, text="accepted"), done) as serving:
        assert ask(run, request, accepted.append, 10) == done
    assert serving.taken == [request]
    assert [answer.text for answer in accepted] == ["accepted"]
    assert json.loads(done.to_json()) == {"outcome": "done", "text": "小狗\n跑", "step": 3, "details": {"loss": 1.5}}
    assert not any((run.control / "requests").iterdir())
    assert not any((run.control / "answers").iterdir())


def test_a_long_text_and_its_longer_sample_arrive(run: RunFolder) -> None:
    text, sampled = "𠀀" * 16_384, "字" * 200_000
    with Serving(run, Answer(outcome=Outcome.DONE, text=sampled)) as serving:
        assert ask(run, Request(command=Command.SAMPLE, text=text), seconds=10).text == sampled
    assert serving.taken[0].text == text


def test_a_request_that_no_run_would_read_is_not_sent(run: RunFolder) -> None:
    request = Request(command=Command.SAMPLE, text="𠀀" * 70_000)
    with pytest.raises(
        UsageError, match=r"run: the request has 280,\d+ bytes, and a run reads up to 262,144: shorten it"
    ):
        ask(run, request, seconds=10)


def test_a_refusal_is_an_error_with_its_reason(run: RunFolder) -> None:
    with (
        Serving(run, Answer(outcome=Outcome.REFUSED, text="the run is paused already")),
        pytest.raises(UsageError, match=r"run: the run is paused already$"),
    ):
        ask(run, Request(command=Command.PAUSE), seconds=10)


def test_a_run_that_ends_before_it_is_done_has_an_exit_code_of_its_own(run: RunFolder) -> None:
    with (
        Serving(run, Answer(outcome=Outcome.ENDED, text="the run has ended first")),
        pytest.raises(WorkerError, match="the run has ended first"),
    ):
        ask(run, Request(command=Command.STOP))


def test_files_are_for_their_user_alone(run: RunFolder) -> None:
    inbox = Inbox(run)
    put(run, '{"command": "save"}')
    ((name, _),) = inbox.take()
    inbox.answer(name, Answer(outcome=Outcome.DONE, text="x"))
    modes = {path.name: path.stat().st_mode & 0o777 for path in [run.control, *run.control.rglob("*")]}
    assert modes == {"control": 0o700, "requests": 0o700, "answers": 0o700, NAME: 0o600}


def test_a_run_that_does_not_run_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with pytest.raises(UsageError, match=r"run: is not running: start it first"):
        ask(run, Request(command=Command.SAVE))
    assert list(run.path.iterdir()) == []


def test_a_run_that_does_not_answer_gets_no_request_later(run: RunFolder) -> None:
    with pytest.raises(BusyError, match=r"no answer within 0.3 s: it is starting, or hangs .* is withdrawn"):
        ask(run, Request(command=Command.STOP), seconds=0.3)
    assert list(Inbox(run).take()) == []


def test_a_run_that_cannot_write_its_answer_is_named(run: RunFolder) -> None:
    with Serving(run), pytest.raises(WorkerError, match=r"has taken the request, and gives no answer within 1 s"):
        ask(run, Request(command=Command.SAVE), seconds=1)


def test_a_run_that_ends_meanwhile_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")

    def hold() -> None:
        with locked(run.lock, "in use"):
            Inbox.clear(run)
            wait_until(lambda: any((run.control / "requests").iterdir()), 10, "a request")
            list(Inbox(run).take())

    thread = threading.Thread(target=hold)
    thread.start()
    wait_until((run.control / "answers").exists, 10, "the folder")
    with pytest.raises(WorkerError, match=r"has ended without an answer"):
        ask(run, Request(command=Command.VALIDATE), seconds=10)
    thread.join()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read"),
        ("[]", "no object"),
        ("[" * 50_000, "cannot be read"),
        ('{"command": "launch"}', "expected one of sample, save"),
        ('{"command": "save", "shell": "rm"}', "unknown key 'shell'"),
        ('{"command": "save", "format_version": 2}', "format_version"),
        ('{"command": "sample", "tokens": "4"}', "tokens"),
        ('{"command": "sample", "tokens": 0}', "tokens"),
        ('{"command": "sample", "temperature": NaN}', "temperature"),
        (b'{"command": "save"}' + b" " * (1 << 18), "no small file"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_what_is_no_request_is_refused(run: RunFolder, text: str | bytes, reason: str) -> None:
    path = put(run, text)
    assert list(Inbox(run).take()) == []
    ((answer),) = answers(run)
    assert (answer.outcome, reason in answer.text) == (Outcome.REFUSED, True), answer
    assert "\n" not in answer.text
    assert not path.exists()


def test_links_pipes_folders_and_other_names_are_not_read(run: RunFolder, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"command": "stop"}')
    requests, inbox = run.control / "requests", Inbox(run)
    (requests / NAME).symlink_to(secret)
    os.mkfifo(requests / NAME.replace("1-", "2-"))
    (requests / NAME.replace("1-", "3-")).mkdir()
    put(run, '{"command": "stop"}', "stop.json")
    put(run, '{"command": "stop"}', f".{NAME}.half")
    for _ in range(2):
        assert list(inbox.take()) == []
    assert secret.exists()
    assert {path.name for path in requests.iterdir()} == {NAME.replace("1-", "3-"), "stop.json", f".{NAME}.half"}


def test_requests_are_taken_in_order_and_once(run: RunFolder) -> None:
    names = [f"{number:019d}-{'0' * 32}.json" for number in (3, 1, 2)]
    for name in names:
        put(run, '{"command": "save"}', name)
    inbox = Inbox(run)
    assert [name for name, _ in inbox.take()] == sorted(names)
    assert list(inbox.take()) == []


def test_what_an_earlier_run_left_is_dropped(run: RunFolder) -> None:
    put(run, '{"command": "stop"}')
    Inbox(run).answer(NAME, Answer(outcome=Outcome.DONE, text="x"))
    assert Inbox.clear(run) == ""
    assert [path.name for path in sorted(run.control.rglob("*"))] == ["answers", "requests"]


def test_old_answers_are_removed(run: RunFolder) -> None:
    inbox = Inbox(run)
    inbox.answer(NAME, Answer(outcome=Outcome.DONE, text="old"))
    os.utime(run.control / "answers" / NAME, (0, 0))
    inbox.answer(NAME.replace("1-", "2-"), Answer(outcome=Outcome.DONE, text="new"))
    assert [answer.text for answer in answers(run)] == ["new"]


def test_an_answer_stays_where_the_clock_is_a_day_ahead_of_the_disk(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = time.time() + 86400
    monkeypatch.setattr(time, "time", lambda: ahead)
    Inbox(run).answer(NAME, Answer(outcome=Outcome.DONE, text="new"))
    assert [answer.text for answer in answers(run)] == ["new"]


def test_a_folder_that_others_can_write_takes_no_commands(run: RunFolder) -> None:
    run.control.chmod(0o770)
    with pytest.raises(UsageError, match=r"control: is no folder that belongs to this user alone; remove it"):
        Inbox(run)
    with pytest.raises(UsageError, match=r"control: is no folder"):
        ask(run, Request(command=Command.SAVE))


def test_a_link_in_place_of_the_folder_takes_no_commands(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Inbox.clear(run)
    for path in ("requests", "answers"):
        (run.control / path).rmdir()
    run.control.rmdir()
    run.control.symlink_to(tmp_path / "elsewhere")
    assert "the run takes no commands" in Inbox.clear(run)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    with pytest.raises(UsageError, match=r"is no folder"):
        Inbox(run)


def test_a_damaged_answer_is_named(run: RunFolder) -> None:
    def answer() -> None:
        requests = run.control / "requests"
        wait_until(lambda: any(requests.glob("[0-9]*.json")), 10, "a request")
        (path,) = requests.glob("[0-9]*.json")
        (run.control / "damaged").write_text("{}")
        (run.control / "damaged").rename(run.control / "answers" / path.name)

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(DataError, match=r"answers/.*: cannot be read: .*outcome"):
        ask(run, Request(command=Command.SAVE), seconds=10)
    thread.join()
