"""`megazh pretrain` as a user sees it: options, refusals, and runs that complete, are interrupted, fail, and resume."""

import contextlib
import os
import pty
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import write_recipe
from processes import Finished, Running, run_command, start_command, wait_until

from megazh.cli import main
from megazh.cluster import start as starting
from megazh.console import MARK
from megazh.errors import INTERRUPTED, REQUEUE, BusyError, DataError, UsageError, WorkerError
from megazh.run.folder import RunFolder
from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import list_checkpoints, read_manifest
from megazh.training.job import Request
from megazh.training.recipe import load_recipe, run_recipe

ROOT = Path(__file__).parents[2]
STEPS = 60
COMMAND = [sys.executable, "-m", "megazh"]
PRETRAIN = [*COMMAND, "pretrain", "-c", "mini.yaml", "--device", "cpu"]
REST = {"device": "cpu", "dry_run": True}
ANEW = "no checkpoint is there yet; run the same command again to begin anew"
AGAIN = "run the same command again to resume from the last checkpoint"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that reach `start`, which is replaced and starts nothing."""
    found: list[Request] = []

    def start(one: Request) -> int:
        found.append(one)
        return 0

    monkeypatch.setattr(starting, "start", start)
    return found


def pretrain(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megazh pretrain LINE`."""
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", *shlex.split(line)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("-g 0 steps=3 -p 1", {"gpus": "0", "stages": 1, "settings": ["steps=3"]}),
        ("steps=3 -t ds_pp -n 2 seed=4", {"num_gpus": 2, "settings": ["steps=3", "seed=4"]}),
        ("-i a.jsonl steps=3", {"inputs": ["a.jsonl"], "settings": ["steps=3"]}),
        ("-i a b/ steps=3 -n 2 seed=4", {"inputs": ["a", "b/"], "num_gpus": 2, "settings": ["steps=3", "seed=4"]}),
        ("-i there=1.jsonl seed=4", {"inputs": ["there=1.jsonl"], "settings": ["seed=4"]}),
        ("--learning_rate=1e-3 -c demo", {"recipe": "demo", "settings": ["--learning_rate=1e-3"]}),
        ("-H hosts -r x --device cpu --dry-run", {**REST, "hostfile": Path("hosts"), "run": Path("x")}),
        ("'sample_prompts=[从前 a, b]'", {"settings": ["sample_prompts=[从前 a, b]"]}),
    ],
)
def test_settings_stand_anywhere(
    capsys: pytest.CaptureFixture[str],
    requests: list[Request],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    expected: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there=1.jsonl").touch()
    assert pretrain(capsys, line) == (0, "", "")
    (one,) = requests
    assert one == Request(**expected)


@pytest.mark.parametrize(
    ("words", "inputs", "settings"),
    [
        ("lang=zh/*.jsonl steps=5", ["lang=zh/*.jsonl"], ["steps=5"]),
        ("lang=*/a.jsonl", ["lang=*/a.jsonl"], []),
        ("seed=4 a", ["seed=4", "a"], []),
        ("raw/lang=en/*.jsonl a", ["raw/lang=en/*.jsonl", "a"], []),
        ("raw/lang=en/a.jsonl", ["raw/lang=en/a.jsonl"], []),
        ("a learning_rate=3e-4 data.manifest=x/y.yaml", ["a"], ["learning_rate=3e-4", "data.manifest=x/y.yaml"]),
        ("a stpes=5", ["a"], ["stpes=5"]),
    ],
)
def test_a_word_with_an_equals_sign_is_a_setting_only_if_it_can_be_one(
    capsys: pytest.CaptureFixture[str],
    requests: list[Request],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    inputs: list[str],
    settings: list[str],
) -> None:
    """Also for files that are missing: what they are named later is a missing file, not an unknown key."""
    monkeypatch.chdir(tmp_path)
    Path("lang=zh").mkdir()
    Path("lang=zh", "a.jsonl").touch()
    Path("seed=4").touch()
    assert pretrain(capsys, f"-i {words}") == (0, "", "")
    assert (requests[0].inputs, requests[0].settings) == (inputs, settings)


@pytest.mark.parametrize("word", ["lang=en.jsonl", "wiki=en", "steps_of=x.txt"])
def test_a_word_that_is_neither_file_nor_setting_is_named_as_both(
    capsys: pytest.CaptureFixture[str], requests: list[Request], word: str
) -> None:
    code, _, err = pretrain(capsys, f"-i a.jsonl {word}")
    assert (code, requests) == (2, [])
    assert err.startswith(
        f"error: -i {word}: no such file or folder, nor a setting: unknown key '{word.split('=')[0]}'"
    )
    assert err.count("\n") == 1


def test_the_encoding_reaches_the_run(capsys: pytest.CaptureFixture[str], requests: list[Request]) -> None:
    assert pretrain(capsys, "-i a.txt --encoding GBK") == (0, "", "")
    assert requests[0].encoding == "gb18030"
    code, _, err = pretrain(capsys, "-i a.txt --encoding klingon")
    assert (code, err.count("\n")) == (2, 1)
    assert "--encoding klingon: no encoding of that name" in err


@pytest.mark.parametrize(
    "line", ["-t gpt", "-n 0", "-n two", "-p 0", "--learning_rate 1e-3", "--device tpu", "-i", "steps"]
)
def test_a_line_that_cannot_be_read(capsys: pytest.CaptureFixture[str], requests: list[Request], line: str) -> None:
    code, out, err = pretrain(capsys, line)
    assert (code, out, requests) == (2, "", [])
    assert "usage: megazh" in err


@pytest.mark.parametrize("error", [UsageError, DataError, BusyError, WorkerError])
def test_an_error_is_one_line_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: type[UsageError]
) -> None:
    def start(_: Request) -> int:
        raise error("what, where, what to do")

    monkeypatch.setattr(starting, "start", start)
    assert pretrain(capsys, "") == (error.exit_code, "", "error: what, where, what to do\n")


@pytest.mark.parametrize("code", [0, 5, 130])
def test_the_exit_code_of_the_ranks_is_that_of_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(starting, "start", lambda _: code)
    assert pretrain(capsys, "") == (code, "", "")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, REQUEUE), (signal.SIGUSR1, REQUEUE), (signal.SIGHUP, INTERRUPTED)]
)
def test_a_signal_before_the_ranks_start_is_an_interruption_with_its_own_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(starting, "start", lambda _: os.kill(os.getpid(), number))
    found, _, error = pretrain(capsys, "")
    assert (found, error) == (code, "interrupted; finished work is kept: run the same command again to continue\n")
    assert signal.getsignal(number) is before


def test_settings_reach_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = pretrain(capsys, "tokens=1M --device cpu --seq_len=128 -n 1 -p 1 --dry-run dtype=bf16")
    assert code == 0
    assert "layout      1 CPU processes = 1 stages x 1 replicas, bf16" in out
    assert "batch       4 x 4 micro-batches x 1 replicas x 128 = 2,048 tokens per step" in out
    assert "length      489 steps, 1,001,472 tokens" in out
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a user works in, with a recipe."""
    folder = tmp_path_factory.mktemp("here")
    write_recipe(folder / "mini.yaml", steps=STEPS)
    return folder


@pytest.fixture(scope="module")
def env() -> dict[str, str | None]:
    """The environment of a terminal."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": None}


@pytest.fixture(scope="module")
def complete(here: Path, env: dict[str, str | None]) -> Finished:
    """The command of a complete run, in `runs/mini`."""
    finished = run_command(PRETRAIN, 240, env, here)
    assert finished.returncode == 0, finished
    return finished


def losses(run: Path) -> dict[int, float]:
    """The loss of each step; no step is there twice."""
    steps = [record for record in read_metrics(run) if record["kind"] == "step"]
    found = {record["step"]: record["loss"] for record in steps}
    assert list(found) == list(range(1, len(steps) + 1))
    return found


def recorded(run: Path) -> int:
    """Number of steps that a run has recorded so far; the last line may be incomplete."""
    path = run / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def errors(finished: Finished) -> list[str]:
    """megazh's own lines on stderr; torch may print warnings there."""
    assert "Traceback" not in finished.stderr
    return [
        line
        for line in finished.stderr.splitlines()
        if line.startswith(("error", "stopping", "stopped: ", "interrupted"))
    ]


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_leaves_all_that_is_promised(complete: Finished, here: Path) -> None:
    run = RunFolder(here / "runs" / "mini")
    dtypes = ["dtype=fp32", "grad_accum_dtype=fp32", "communication_dtype=fp32"]
    cut = f"stage_bounds={read_manifest(run.checkpoints / f'step_{STEPS:08d}').bounds}"
    expected = load_recipe(here / "mini.yaml", ["device=cpu", cut, *dtypes])  # what ran, written out
    assert run_recipe(run) == expected
    assert load_recipe(run.path / "config.yaml") == expected
    assert run.info().corpora[0].name == "corpus"
    assert (run.path / "tokenizer.json").read_bytes() == (here / "data_index/mini/tokenizer.json").read_bytes()
    assert read_manifest(run.checkpoints / f"step_{STEPS:08d}").step == STEPS
    assert (run.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert next((run.path / "tensorboard").glob("events.out.tfevents.*")).stat().st_size > 1000
    assert sorted(path.name for path in run.logs.iterdir()) == ["console.log", "rank_0.log", "rank_1.log"]
    log = (run.logs / "console.log").read_text().splitlines()
    assert [line for line in log if not MARK.match(line)] == complete.stdout.splitlines()
    found = losses(run.path)
    assert len(found) == STEPS
    assert found[STEPS] < found[1] - 0.3
    kinds = [record["kind"] for record in read_metrics(run.path)]
    assert (kinds.count("validation"), kinds.count("sample")) == (2, 1)
    lines = complete.stdout.splitlines()
    assert f"loss        {found[1]:.4f} at step 1, {found[STEPS]:.4f} at the end" in lines
    assert f"runs/mini: complete, {STEPS} steps" in lines
    assert complete.stderr == "", "no warning of torch or DeepSpeed reaches the terminal"


@pytest.mark.ranks
@pytest.mark.slow
def test_the_printed_commands_work(
    complete: Finished,
    here: Path,
    env: dict[str, str | None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = complete.stdout.splitlines()
    board, longer, anew = (shlex.split(line, comments=True) for line in lines[-3:])
    finished = run_command(["sh", "-c", lines[-4]], 60, env, here)
    assert (finished.returncode, finished.stdout.startswith("从前，")) == (0, True), finished
    assert board[-2] == "--logdir"
    assert (here / board[-1]).is_dir()
    monkeypatch.chdir(here)
    for command, run, steps in ((longer, "runs/mini", 2 * STEPS), (anew, "runs/mini-2", STEPS)):
        assert command[0] == "bash"
        assert Path(command[1]).samefile(ROOT / "jobs" / "run_pretrain.sh")
        code, out, _ = pretrain(capsys, shlex.join([*command[2:], "--dry-run"]))
        assert code == 0
        assert f"run         {run}" in out.splitlines()
        assert f"length      {steps} steps, " in out


@pytest.mark.ranks
@pytest.mark.slow
def test_the_same_command_again_says_complete(complete: Finished, here: Path, env: dict[str, str | None]) -> None:
    run = here / "runs" / "mini"
    before = (run / "metrics.jsonl").read_bytes(), list_checkpoints(run / "checkpoints")
    finished = run_command(PRETRAIN, 60, env, here)
    assert finished.returncode == 0
    assert errors(finished) == []
    assert finished.stdout == complete.stdout[complete.stdout.index(f"\nruns/mini: complete, {STEPS} steps\n") :]
    assert ((run / "metrics.jsonl").read_bytes(), list_checkpoints(run / "checkpoints")) == before


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.usefixtures("complete")
def test_more_steps_train_on_from_there(here: Path, env: dict[str, str | None]) -> None:
    longer = shutil.copytree(here / "runs" / "mini", here / "runs" / "longer")
    finished = run_command([*PRETRAIN, "-r", "runs/longer", f"steps={STEPS + 4}", "allow_bend=true"], 120, env, here)
    assert finished.returncode == 0, finished
    assert f"resumed at step {STEPS} of {STEPS + 4}" in finished.stdout
    found = losses(longer)
    assert len(found) == STEPS + 4
    assert {step: found[step] for step in range(1, STEPS + 1)} == losses(here / "runs" / "mini")
    assert list_checkpoints(longer / "checkpoints")[-1].name == f"step_{STEPS + 4:08d}"


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.usefixtures("complete")
def test_moved_elsewhere_it_needs_no_data(here: Path, env: dict[str, str | None], tmp_path: Path) -> None:
    shutil.copytree(here / "runs" / "mini", tmp_path / "moved")
    options = ["从前，", "--temperature", "0", "--max-tokens", "20"]
    moved = run_command([*COMMAND, "sample", "moved", *options], 60, env, tmp_path)
    assert moved.returncode == 0, moved
    assert len(moved.stdout) > len("从前，\n")


@contextlib.contextmanager
def training(here: Path, env: dict[str, str | None], name: str, *settings: str) -> Iterator[Running]:
    """Start the run `runs/NAME`; the block begins after two steps."""
    run = here / "runs" / name
    with start_command([*PRETRAIN, "-r", f"runs/{name}", *settings], env, here) as running:
        wait_until(lambda: recorded(run) >= 2 or running.process.poll() is not None, 120, f"two steps of {name}")
        assert running.process.poll() is None, running.wait(1)
        yield running


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.usefixtures("complete")
def test_ctrl_c_saves_and_the_same_command_goes_on(here: Path, env: dict[str, str | None]) -> None:
    run = here / "runs" / "stopped"
    with training(here, env, "stopped") as running:
        running.process.send_signal(signal.SIGINT)
        finished = running.wait(90)
        assert running.descendants() == []
    assert finished.returncode == INTERRUPTED
    assert errors(finished) == [
        "stopping: interrupted (Ctrl-C); the ranks save and end (a second Ctrl-C kills them)",
        f"interrupted; {AGAIN}",
    ]
    assert "interrupted" not in finished.stdout, "a third time"
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    step = read_manifest(checkpoint).step
    assert 2 <= step == recorded(run) < STEPS
    finished = run_command([*PRETRAIN, "-r", "runs/stopped"], 120, env, here)
    assert finished.returncode == 0, finished
    assert f"resumed at step {step} of {STEPS}" in finished.stdout
    assert losses(run) == losses(here / "runs" / "mini"), "as if it had not been interrupted"
    assert ends(run) == [(INTERRUPTED, "interrupted (Ctrl-C)"), (0, "done")]
    (stop,) = (each for each in read_metrics(run) if each["kind"] == "event" and each["name"] == "stop")
    assert (stop["step"], stop["details"]) == (step, {"reason": "person", "exit_code": INTERRUPTED})


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.usefixtures("complete")
def test_a_signal_while_the_ranks_start_ends_them_at_once(here: Path, env: dict[str, str | None]) -> None:
    run = here / "runs" / "early"
    with start_command([*PRETRAIN, "-r", "runs/early"], env, here) as running:
        log = run / "logs" / "rank_1.log"
        wait_until(lambda: log.exists() and "process" in log.read_text(), 60, "rank 1 has begun")
        running.process.send_signal(signal.SIGUSR1)
        finished = running.wait(10)
        assert running.descendants() == []
    assert finished.returncode == REQUEUE
    assert errors(finished)[-1] == f"stopped: the time limit is near (SIGUSR1); {ANEW}"
    assert ends(run) == [(REQUEUE, "the time limit is near (SIGUSR1)")]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.usefixtures("complete")
def test_a_rank_that_is_stopped_ends_the_run(here: Path, env: dict[str, str | None]) -> None:
    with training(here, env, "hangs", "hang_minutes=0.1") as running:
        os.kill(process_of_rank(running, 1), signal.SIGSTOP)
        finished = running.wait(30)
        assert running.descendants() == []
    assert finished.returncode == WorkerError.exit_code
    (line,) = errors(finished)
    assert line.startswith("error: no rank has got on for 0:00:06 after step ")
    assert "the others wait for rank 1 (stage 1), which is stopped by a signal (SIGSTOP); it is in " in line
    assert ends(here / "runs" / "hangs") == [(WorkerError.exit_code, line)]
    for rank in range(2):
        stacks = (here / "runs" / "hangs" / "logs" / f"rank_{rank}.log").read_text()
        assert re.search(
            r'\n(Current t|T)hread .*\n(  File .*\n)+  File "\S*/training/loop.py", line \d+ in take_step\n', stacks
        )


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.usefixtures("complete")
def test_a_killed_rank_is_named_and_nothing_is_left(here: Path, env: dict[str, str | None]) -> None:
    with training(here, env, "killed") as running:
        os.kill(process_of_rank(running, 1), signal.SIGKILL)
        finished = running.wait(60)
        assert running.descendants() == []
    assert finished.returncode == WorkerError.exit_code
    assert errors(finished) == [
        "error: rank 1 (stage 1) was killed by signal 9 (out of memory?); all ranks ended; its last output is in "
        f"runs/killed/logs/rank_1.log; {AGAIN}"
    ]
    assert ends(here / "runs" / "killed") == [(WorkerError.exit_code, errors(finished)[0])]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.usefixtures("complete")
def test_a_run_whose_output_nobody_reads_is_whole(here: Path, env: dict[str, str | None]) -> None:
    script = shlex.quote(str(ROOT / "jobs" / "run_pretrain.sh"))
    line = f"bash {script} -c mini.yaml --device cpu -r runs/unread steps=5 | head -n 3; exit ${{PIPESTATUS[0]}}"
    finished = run_command(["bash", "-c", line], 120, {**env, "MEGAZH_PYTHON": sys.executable}, here)
    assert (finished.returncode, errors(finished)) == (0, [])
    assert len(finished.stdout.splitlines()) == 3
    run = RunFolder(here / "runs" / "unread")
    assert len(losses(run.path)) == 5
    log = (run.logs / "console.log").read_text().splitlines()
    assert log[1:4] == finished.stdout.splitlines(), "what was shown, and all the rest"
    assert [line.split(" |")[0] for line in log if line.startswith("step ")] == [f"step {n}/5" for n in range(1, 6)]
    assert {"runs/unread: complete, 5 steps", "go on:"} <= set(log)
    assert log[-1].endswith("ended with exit code 0")
    for rank in range(2):
        begin, place, *_, end = (run.logs / f"rank_{rank}.log").read_text().splitlines()
        assert f" rank {rank}: process " in begin
        assert f" rank {rank}: stage {rank} of 2, replica 0 of 1; cpu, 1 threads" in place
        assert f" rank {rank}: ended with exit code 0 after 0:0" in end
    (start,) = (line for line in log if line.startswith("first step after"))
    total, launcher = (float(text) for text in re.findall(r"after (\d+\.\d) s: launcher (\d+\.\d)", start)[0])
    assert launcher < total


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.usefixtures("complete")
def test_closing_the_terminal_saves(here: Path, env: dict[str, str | None]) -> None:
    run = RunFolder(here / "runs" / "hung up")
    line = shlex.join([*PRETRAIN, "-r", "runs/hung up"])
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(here)
        os.environ.update({name: value for name, value in env.items() if value is not None})
        os.execvp("bash", ["bash", "--norc", "-i", "-c", f"{line}; true"])
    try:
        wait_until(lambda: recorded(run.path) >= 2, 120, "two steps")
        os.close(terminal)
        wait_until(lambda: list_checkpoints(run.checkpoints), 60, "a checkpoint")
        log = run.logs / "console.log"
        wait_until(lambda: log.read_text().endswith("ended with exit code 130\n"), 30, "the end of the launcher")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    (checkpoint,) = list_checkpoints(run.checkpoints)
    assert 2 <= read_manifest(checkpoint).step == recorded(run.path) < STEPS
    assert f"\nstopped: the terminal was closed (SIGHUP); {AGAIN}\n" in log.read_text()
    assert ends(run.path) == [(INTERRUPTED, "the terminal was closed (SIGHUP)")]


def ends(run: Path) -> list[tuple[int | None, str | None]]:
    """Exit code and reason of each attempt of a run, as run.json has them."""
    attempts = RunFolder(run).info().attempts
    assert all(attempt.ended is not None and attempt.ended >= attempt.started for attempt in attempts)
    return [(attempt.exit_code, attempt.reason) for attempt in attempts]


def process_of_rank(running: Running, rank: int) -> int:
    """The process of a rank."""
    for process in running.descendants():
        folder = Path("/proc") / str(process)
        variables = (folder / "environ").read_bytes().split(b"\0")
        if b"\0rank\0" in (folder / "cmdline").read_bytes() and f"RANK={rank}".encode() in variables:
            return process
    raise AssertionError(f"no process of rank {rank}")
