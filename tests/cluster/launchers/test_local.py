"""Starting ranks: environment, the failure that is reported, no process left behind, outputs that nobody reads."""

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import Finished, Running, run_command, start_command, wait_until

from megazh.cluster.launchers.local import run_ranks
from megazh.errors import UsageError

pytestmark = pytest.mark.ranks

DRIVER = """
import json, sys
from pathlib import Path
from megazh.cluster.launchers import local, supervisor
settings = json.loads(sys.argv[1])
for name, seconds in settings.pop("seconds").items():
    setattr(supervisor, name, seconds)
def at_end(code, reason):
    Path("end.json").write_text(json.dumps([code, reason]))
sys.exit(local.run_ranks(log_folder=Path("logs"), at_end=at_end, **settings))
"""
RANK = "import os, sys, time, signal\nrank = int(os.environ['RANK'])\n"
AGAIN = "run the same command again to resume from the last checkpoint"


def command(script: str, ranks: int, gpu_ids: list[str] | None = None, seconds: dict[str, float] | None = None, **more):
    settings = {
        "arguments": ["-c", RANK + script],
        "ranks": ranks,
        "env": more.pop("env", {}),
        "gpu_ids": gpu_ids,
        "labels": [f"rank {rank} (stage {rank})" for rank in range(ranks)],
        "seconds": seconds or {},
        "hang_seconds": more.pop("hang_seconds", 0.0),
    }
    return [sys.executable, "-c", DRIVER, json.dumps(settings)]


def launch(
    tmp_path: Path, script: str, ranks: int = 3, environ: dict[str, str | None] | None = None, **more
) -> Finished:
    return run_command(command(script, ranks, **more), 30, environ, tmp_path)


@contextmanager
def running(tmp_path: Path, script: str, ranks: int = 2, **more) -> Iterator[Running]:
    """Start ranks that run `script` and then loop; the block begins when each has made its file `ready_N`."""
    script = f"{script}\nopen(f'ready_{{rank}}', 'w').close()\nwhile True: time.sleep(0.05)"
    with start_command(command(script, ranks, **more), cwd=tmp_path) as started:
        wait_until(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in range(ranks)), 20, "all ranks ready")
        yield started


def test_ranks_find_what_torch_distributed_wants(tmp_path: Path) -> None:
    script = "import json; json.dump(dict(os.environ), open(f'{rank}.json', 'w'))"
    foreign = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "PMI_RANK": "3", "RANK": "9", "WORLD_SIZE": "9"}
    environ = {**foreign, "SLURM_JOB_ID": "17", "OMP_NUM_THREADS": None}
    finished = launch(tmp_path, script, environ=environ, env={"OWN": "1"})
    assert (finished.returncode, finished.stderr) == (0, "")
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, values in enumerate(found):
        assert (values["RANK"], values["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (values["WORLD_SIZE"], values["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert (values["MASTER_ADDR"], values["OWN"]) == ("127.0.0.1", "1")
        assert (values["CUDA_VISIBLE_DEVICES"], values["DS_ACCELERATOR"]) == ("", "cpu")
        assert values["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))
        assert values["PATH"].startswith(str(Path(sys.executable).parent))
        assert not {"SLURM_PROCID", "SLURM_NTASKS", "PMI_RANK"} & set(values)
        assert values["SLURM_JOB_ID"] == "17"
    assert len({values["MASTER_PORT"] for values in found}) == 1


def test_ranks_see_the_chosen_gpus_as_nvidia_smi_counts(tmp_path: Path) -> None:
    script = "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['CUDA_DEVICE_ORDER'], os.environ['OMP_NUM_THREADS'])"
    finished = launch(tmp_path, script, 2, {"CUDA_VISIBLE_DEVICES": "4,5", "OMP_NUM_THREADS": "7"}, gpu_ids=["1", "3"])
    assert finished.stdout == "1,3 PCI_BUS_ID 7\n"
    assert (tmp_path / "logs" / "rank_1.log").read_text() == "1,3 PCI_BUS_ID 7\n"


def test_rank_0_is_on_the_terminal_and_the_others_are_in_logs(tmp_path: Path) -> None:
    script = "print('out', rank); print('warning', rank, file=sys.stderr)"
    finished = launch(tmp_path, script)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "out 0\n", "warning 0\n")
    logs = [(tmp_path / "logs" / f"rank_{rank}.log").read_text() for rank in range(3)]
    assert logs[0] == "warning 0\n"
    assert sorted(logs[1].splitlines()) == ["out 1", "warning 1"]
    launch(tmp_path, script)
    assert (tmp_path / "logs" / "rank_0.log").read_text() == "warning 0\n" * 2, "an earlier run's log is kept"


@pytest.mark.parametrize("code", [2, 3, 4, 5])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_says_what_is_wrong_is_quoted_once(tmp_path: Path, rank: int, code: int) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / f"rank_{rank}.log").write_text("error: of an earlier run\n")
    script = f"""
if rank == {rank}: print('error: no such key', file=sys.stderr); sys.exit({code})
time.sleep(30)"""
    begin = time.monotonic()
    finished = launch(tmp_path, script)
    assert (finished.returncode, finished.stderr) == (code, "error: no such key\n")
    assert time.monotonic() - begin < 4, "the others did not end at once"


def test_an_error_of_an_earlier_run_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.log").write_text("error: of an earlier run\n")
    finished = launch(tmp_path, "print('disk gone', file=sys.stderr); sys.exit(5)", 1)
    assert finished.returncode == 5
    assert "earlier" not in finished.stderr
    assert "rank 0 (stage 0) ended with exit code 5 (disk gone)" in finished.stderr


def test_the_first_death_is_the_cause(tmp_path: Path) -> None:
    script = """
if rank == 1: sys.exit('out of things')
while os.path.exists('/proc/%d' % os.getppid()):
    time.sleep(0.01)
    if any('out of things' in open(f'logs/rank_{n}.log').read() for n in (1,)):
        time.sleep(0.02)
        raise ConnectionError('peer has gone')"""
    finished = launch(tmp_path, script, 4)
    assert finished.returncode == 1
    assert finished.stderr == (
        "error: rank 1 (stage 1) ended with exit code 1 (out of things); all ranks ended; its last output is in "
        f"logs/rank_1.log; {AGAIN}\n"
    )


def test_a_death_that_is_heard_of_late_is_the_cause_of_failed_collectives(tmp_path: Path) -> None:
    script = """
if rank == 1:
    while not os.path.exists('failed'): time.sleep(0.01)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 0:
    open('failed', 'w').close()
    raise ConnectionError('peer has gone')
time.sleep(30)"""
    finished = launch(tmp_path, script)
    assert finished.returncode == 5
    assert finished.stderr.splitlines()[-1].startswith("error: rank 1 (stage 1) was killed by signal 9")


def test_of_a_traceback_the_exception_is_quoted(tmp_path: Path) -> None:
    script = """
def prefixed(error_type, error, trace):
    import traceback
    for line in ''.join(traceback.format_exception(error_type, error, trace)).splitlines():
        print('[rank0]:', line, file=sys.stderr)
    print('[W1122 comm.cpp:1] not destroyed', file=sys.stderr)
sys.excepthook = prefixed
print('loading', file=sys.stderr)
raise ValueError('seven stages')"""
    finished = launch(tmp_path, script, 1)
    shown, line = finished.stderr.splitlines()
    assert shown == "loading"
    assert line.startswith("error: rank 0 (stage 0) ended with exit code 1 (ValueError: seven stages); all ranks ended")
    assert finished.returncode == 1


def test_a_killed_rank_is_named_with_its_stage(tmp_path: Path) -> None:
    finished = launch(tmp_path, "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(30)")
    assert finished.returncode == 5
    assert finished.stderr == (
        "error: rank 1 (stage 1) was killed by signal 9 (out of memory?); all ranks ended; its last output is in "
        f"logs/rank_1.log; {AGAIN}\n"
    )


def test_ranks_that_do_not_heed_sigterm_are_killed(tmp_path: Path) -> None:
    script = """
if rank == 0:
    while not os.path.exists('deaf'): time.sleep(0.01)
    sys.exit(7)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open('deaf', 'w').close()
time.sleep(60)"""
    with start_command(command(script, 2, seconds={"_KILL_SECONDS": 5}), cwd=tmp_path) as started:
        finished = started.wait(10)
        assert started.descendants() == []
    assert finished.returncode == 5
    assert "ended with exit code 7" in finished.stderr


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGHUP, 130, "stopped: the terminal was closed (SIGHUP)"),
        (signal.SIGTERM, 75, "stopped: terminated (SIGTERM)"),
        (signal.SIGUSR1, 75, "stopped: the time limit is near (SIGUSR1)"),
    ],
)
def test_a_signal_reaches_the_ranks_as_it_is_and_lets_them_save(
    tmp_path: Path, number: signal.Signals, code: int, line: str
) -> None:
    script = f"""
def save(*_):
    time.sleep(0.5)
    open(f'saved_{{rank}}', 'w').close()
    sys.exit({code} if rank else 0)
signal.signal({int(number)}, save)"""
    with running(tmp_path, script) as started:
        started.process.send_signal(number)
        finished = started.wait(10)
        assert started.descendants() == []
    assert finished.returncode == code
    assert (tmp_path / "saved_0").exists()
    assert (tmp_path / "saved_1").exists()
    assert finished.stderr.splitlines()[-1] == f"{line}; {AGAIN}"
    assert json.loads((tmp_path / "end.json").read_text())[0] == code


def test_a_scheduler_is_heeded_where_signals_were_ignored_at_the_start(tmp_path: Path) -> None:
    """As in some containers. A rank has them back before it runs any code of its own."""
    words = shlex.join(command("while True: time.sleep(0.05)", 2))
    script = f"trap '' USR1 TERM; exec {words}"
    with start_command(["bash", "-c", script], cwd=tmp_path) as started:
        wait_until(lambda: len(started.descendants()) == 3, 20, "both ranks")
        time.sleep(0.5)
        started.process.send_signal(signal.SIGUSR1)
        finished = started.wait(10)
    assert finished.returncode == 75, finished


def test_a_person_outranks_the_scheduler(tmp_path: Path) -> None:
    """SIGUSR1 and then Ctrl-C, while the ranks save: no scheduler may start the run again."""
    with running(tmp_path, SAVES.replace("0.3", "1").replace("130", "75")) as started:
        started.process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
        started.process.send_signal(signal.SIGINT)
        finished = started.wait(10)
    assert finished.returncode == 130
    assert (tmp_path / "saved_1").exists(), "the first Ctrl-C lets them save"
    assert json.loads((tmp_path / "end.json").read_text()) == [130, "interrupted (Ctrl-C)"]


def test_ctrl_c_before_the_ranks_listen_ends_them(tmp_path: Path) -> None:
    with running(tmp_path, "if rank: signal.signal(signal.SIGINT, signal.SIG_IGN)") as started:
        started.process.send_signal(signal.SIGINT)
        finished = started.wait(10)
    assert finished.returncode == 130
    assert "Traceback" not in finished.stderr


def test_ctrl_c_while_python_starts_is_an_interruption(tmp_path: Path) -> None:
    """Python then ends with 1 and a traceback that ends in KeyboardInterrupt."""
    stop = "lambda *_: (print('KeyboardInterrupt', file=sys.stderr, flush=True), os._exit(1))"
    with running(tmp_path, f"signal.signal(signal.SIGINT, {stop})") as started:
        started.process.send_signal(signal.SIGINT)
        finished = started.wait(20)
    assert finished.returncode == 130
    assert finished.stderr.splitlines()[-1].startswith("interrupted")


def test_the_second_ctrl_c_kills(tmp_path: Path) -> None:
    with running(tmp_path, "signal.signal(signal.SIGINT, signal.SIG_IGN)") as started:
        started.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            started.process.wait(0.5)
        started.process.send_signal(signal.SIGINT)
        assert started.wait(5).returncode == 130
        assert started.descendants() == []


def test_ranks_that_do_not_save_in_time_are_killed_and_named(tmp_path: Path) -> None:
    script = "if rank: signal.signal(signal.SIGINT, signal.SIG_IGN)\nelse: signal.signal(2, lambda *_: sys.exit(0))"
    with running(tmp_path, script, seconds={"SAVE_SECONDS": 0.5}) as started:
        started.process.send_signal(signal.SIGINT)
        finished = started.wait(10)
    assert finished.returncode == 130
    assert "rank 1 (stage 1) did not end within" in finished.stderr


def test_a_rank_that_fails_to_save_is_reported(tmp_path: Path) -> None:
    script = """
def save(*_):
    print('error: disk full', file=sys.stderr)
    sys.exit(5)
if rank: signal.signal(signal.SIGINT, save)
else: signal.signal(signal.SIGINT, signal.SIG_IGN)"""
    with running(tmp_path, script) as started:
        started.process.send_signal(signal.SIGINT)
        finished = started.wait(10)
    assert finished.returncode == 5
    assert finished.stderr.splitlines()[-1] == "error: disk full"


def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    with running(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)", 3) as started:
        assert len(started.descendants()) == 4
        started.process.kill()
        wait_until(lambda: not started.descendants(), 5, "no rank left")


def test_what_a_rank_started_ends_with_it(tmp_path: Path) -> None:
    script = "import subprocess; subprocess.Popen(['sleep', '60'])"
    with start_command(command(script, 2), cwd=tmp_path) as started:
        assert started.wait(10).returncode == 0
        assert started.descendants() == []


SAVES = """
def save(*_):
    print('saving', flush=True)
    time.sleep(0.3)
    open(f'saved_{rank}', 'w').close()
    sys.exit(130)
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1): signal.signal(number, save)"""
STEPS = "for step in range(40): print('step', step, flush=True); print('note', step, file=sys.stderr); time.sleep(0.02)"


@contextmanager
def on_a_terminal(tmp_path: Path, script: str, ranks: int = 2, shell: str = "") -> Iterator[tuple[int, int]]:
    """Run ranks as `bash -i` does, in the foreground of a terminal; yields the terminal and the shell's process.

    The exit code of the launcher is written to the file `code`.
    """
    words = shlex.join(command(script, ranks))
    (tmp_path / "line.sh").write_text(f"{words}{shell}\necho $? > code\n")
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execvp("bash", ["bash", "--norc", "-i", "line.sh"])
    try:
        yield terminal, process
    finally:
        for child in (*_children(process), process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.close(terminal)
        os.waitpid(process, 0)


def _children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


@pytest.mark.parametrize("ends", ["| head -n 2", "| true", ">&-", "2>&-", "> /dev/full 2>&1", "|& head -n 1"])
def test_a_run_goes_to_its_end_whoever_reads(tmp_path: Path, ends: str) -> None:
    script = f"{STEPS}\nopen(f'done_{{rank}}', 'w').close(); sys.exit(7 if rank else 0)"
    line = f"{shlex.join(command(script, 2))} {ends}\necho ${{PIPESTATUS[0]}} > code"
    run_command(["bash", "-c", line], 30, cwd=tmp_path)
    assert (tmp_path / "code").read_text() == "5\n", "rank 1 ends with 7, which is no code of megazh"
    assert (tmp_path / "done_0").exists() or (tmp_path / "done_1").exists()


def test_a_terminal_that_closes_lets_the_ranks_save(tmp_path: Path) -> None:
    """The kernel and the shell both send SIGHUP; the second one must not kill the ranks."""
    script = f"{SAVES}\nopen(f'ready_{{rank}}', 'w').close()\nwhile True: print('step', flush=True); time.sleep(0.02)"
    with on_a_terminal(tmp_path, script) as (terminal, _):
        wait_until(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in range(2)), 20, "all ranks ready")
        os.close(terminal)
        wait_until(lambda: all((tmp_path / f"saved_{rank}").exists() for rank in range(2)), 10, "all ranks saved")


def test_a_terminal_that_stops_does_not_hold_up_a_save(tmp_path: Path) -> None:
    """Nobody reads the terminal, as after Ctrl-S: its buffer is full, and who writes to it waits."""
    script = f"{SAVES}\nopen(f'ready_{{rank}}', 'w').close()\nwhile True: print('step' * 99, flush=True)"
    with on_a_terminal(tmp_path, script) as (_, shell):
        wait_until(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in range(2)), 20, "all ranks ready")
        time.sleep(0.5)
        (launcher,) = _children(shell)
        os.kill(launcher, signal.SIGTERM)
        wait_until(lambda: all((tmp_path / f"saved_{rank}").exists() for rank in range(2)), 10, "all ranks saved")
        wait_until(lambda: not Path(f"/proc/{launcher}/fd").exists() or not _children(shell), 20, "the launcher ended")


def test_a_second_sigterm_or_sighup_does_not_kill(tmp_path: Path) -> None:
    with running(tmp_path, SAVES) as started:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            started.process.send_signal(number)
            time.sleep(0.05)
        finished = started.wait(10)
    assert finished.returncode == 75
    assert finished.stderr.count("stopping: ") == 1
    assert (tmp_path / "saved_0").exists()
    assert (tmp_path / "saved_1").exists()


PULSE = """
import faulthandler
from megazh.run.pulse import beat, open_pulse
from megazh.training.hang import write_stacks_to
from pathlib import Path
write_stacks_to(Path(f'logs/rank_{rank}.log'))
assert open_pulse()
"""


def test_a_run_that_gets_on_does_not_hang(tmp_path: Path) -> None:
    script = (
        f"{PULSE}\nfor step in range(30): beat('step', step); time.sleep(0.1)\nbeat('stopped', reason=2)\nsys.exit(75)"
    )
    finished = launch(tmp_path, script, 2, hang_seconds=1.5)
    assert (finished.returncode, finished.stderr) == (75, f"stopped: the time limit is near (SIGUSR1); {AGAIN}\n")
    assert json.loads((tmp_path / "end.json").read_text()) == [75, "the time limit is near (SIGUSR1)"]


HANGS = {
    ", which is stopped by a signal (SIGSTOP); it is in suspended, ": """
def suspended(): os.kill(os.getpid(), signal.SIGSTOP)
beat('step', 4)
if rank == 1: suspended()
time.sleep(60)""",
    ", which is at step 3 while others are at step 4; it is in busy, ": """
def busy():
    while True: pass
beat('step', 3 if rank == 1 else 4)
busy()""",
    "; it is in busy, ": """
import torch.distributed as dist, datetime, torch
def busy():
    while True: pass
dist.init_process_group('gloo')
beat('step', 4)
busy() if rank == 1 else dist.all_reduce(torch.ones(1))""",
}


@pytest.mark.parametrize("why", HANGS)
def test_a_hang_ends_the_run_with_stacks_and_names_the_rank(tmp_path: Path, why: str) -> None:
    begin = time.monotonic()
    finished = launch(tmp_path, PULSE + HANGS[why], 3, hang_seconds=6 if "torch" in HANGS[why] else 2)
    assert time.monotonic() - begin < 25
    assert finished.returncode == 5
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: no rank has got on for 0:00:0")
    assert f"after step 4 (phase 'step'): the others wait for rank 1 (stage 1){why}" in line
    assert line.endswith(f"the stacks of all ranks are in logs/rank_*.log; all ranks were killed; {AGAIN}")
    for rank in range(3):
        assert "\nCurrent thread" in (tmp_path / "logs" / f"rank_{rank}.log").read_text()
    assert json.loads((tmp_path / "end.json").read_text()) == [5, line]


def test_what_nobody_expected_in_one_rank_ends_others_that_wait_for_it(tmp_path: Path) -> None:
    script = """
from pathlib import Path
from megazh.training import worker
if rank == 1:
    def fail(run): raise ValueError('nobody expected this')
    worker.run_recipe = fail
    worker.leave(worker.work(Path('.')))
import torch.distributed
torch.distributed.init_process_group('gloo')
torch.distributed.barrier()"""
    finished = launch(tmp_path, script, 2)
    assert finished.returncode == 1
    assert finished.stderr == (
        "error: rank 1 (stage 1) ended with exit code 1 (ValueError: nobody expected this); all ranks ended; its last "
        f"output is in logs/rank_1.log; {AGAIN}\n"
    )
    assert "Traceback" in (tmp_path / "logs" / "rank_1.log").read_text()


def test_a_run_that_is_complete_is_done_whatever_was_requested_last(tmp_path: Path) -> None:
    """What depends on it, as a job of Slurm may, is to go on."""
    with running(tmp_path, "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))") as started:
        started.process.send_signal(signal.SIGUSR1)
        finished = started.wait(10)
    assert finished.returncode == 0
    assert json.loads((tmp_path / "end.json").read_text()) == [0, "done"]


def test_ranks_that_stop_by_themselves_are_waited_for(tmp_path: Path) -> None:
    """Slurm signals all processes, and a rank tells the others; the launcher may be the last to know."""
    script = """
if rank == 1:
    time.sleep(0.5)
    open('saved_1', 'w').close()
sys.exit(130)"""
    finished = launch(tmp_path, script, 2)
    assert (finished.returncode, finished.stderr) == (130, f"interrupted; {AGAIN}\n")
    assert (tmp_path / "saved_1").exists()


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        ("raise RuntimeError('Connection closed by peer')", 75, f"stopped: terminated (SIGTERM); {AGAIN}"),
        ("os.kill(os.getpid(), signal.SIGABRT)", 75, f"stopped: terminated (SIGTERM); {AGAIN}"),
        ("print('error: a damaged index', file=sys.stderr); sys.exit(3)", 3, "error: a damaged index"),
    ],
)
def test_a_rank_that_fails_since_another_was_stopped_is_no_failure(
    tmp_path: Path, failure: str, code: int, line: str
) -> None:
    """A signal before the first step ends one rank; another has agreed with it just before, and is in a collective."""
    script = f"""
if rank == 1:
    time.sleep(0.5)
    {failure}
sys.exit(75)"""
    finished = launch(tmp_path, script, 2)
    assert (finished.returncode, finished.stderr) == (code, f"{line}\n")
    assert json.loads((tmp_path / "end.json").read_text())[0] == code


def test_a_reason_reaches_the_user_when_the_disk_of_the_log_is_full(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_1.log").symlink_to("/dev/full")
    script = """
from megazh.training.worker import _Notes
from pathlib import Path
if rank == 1: sys.exit(_Notes(Path('logs')).fail('error: the disk is full', 5))
time.sleep(30)"""
    finished = launch(tmp_path, script, 2)
    assert (finished.returncode, finished.stderr) == (5, "error: the disk is full\n")


def test_a_killed_rank_leaves_a_line_in_its_log(tmp_path: Path) -> None:
    launch(tmp_path, "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(30)", 2)
    logs = [(tmp_path / "logs" / f"rank_{rank}.log").read_text() for rank in range(2)]
    assert re.fullmatch(r"--- [-\d]+ [\d:+-]+ rank 1: ended by signal 9\n", logs[1])
    assert re.fullmatch(r"--- [-\d]+ [\d:+-]+ rank 0: ended by signal 9 of its launcher\n", logs[0])


def test_lines_of_a_terminal_without_chinese(tmp_path: Path) -> None:
    script = "print('从前 🐝'); print('蜂蜜', file=sys.stderr)"
    finished = launch(tmp_path, script, 1, {"PYTHONIOENCODING": "latin-1"})
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "?? ?\n", "??\n")
    assert (tmp_path / "logs" / "rank_0.log").read_text(encoding="utf-8") == "蜂蜜\n"


def test_another_port_is_tried_where_the_first_is_taken(tmp_path: Path) -> None:
    script = """
if rank == 0:
    with open('ports', 'a') as file: print(os.environ['MASTER_PORT'], file=file)
    if len(open('ports').readlines()) < 3:
        sys.exit('The server socket has failed to listen: code: -98, name: EADDRINUSE')
while not os.path.exists('ports') or len(open('ports').readlines()) < 3: time.sleep(0.01)"""
    finished = launch(tmp_path, script, 2)
    assert finished.returncode == 0, finished.stderr
    assert len(set((tmp_path / "ports").read_text().split())) == 3


def test_a_port_that_is_never_free_is_an_error(tmp_path: Path) -> None:
    script = "open('starts', 'a').write('x'); sys.exit('name: EADDRINUSE')"
    finished = launch(tmp_path, script, 1)
    assert finished.returncode == 1
    assert (tmp_path / "starts").read_text() == "xxx"
    assert finished.stderr.count("error:") == 1


def test_rank_0_can_listen_on_the_port(tmp_path: Path) -> None:
    script = """
import socket
server = socket.create_server(('', int(os.environ['MASTER_PORT'])))
print(server.getsockname()[1] == int(os.environ['MASTER_PORT']))"""
    assert launch(tmp_path, script, 1).stdout == "True\n"


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_copies_of_the_launcher_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "6")
    with pytest.raises(UsageError, match=f"{name}=6.*start this command once"):
        run_ranks(["-c", "open('started', 'w')"], 1, {}, None, tmp_path)
    assert not list(tmp_path.iterdir())
