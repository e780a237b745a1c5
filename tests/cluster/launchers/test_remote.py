"""Ranks behind lifelines end as local ones do: signals, failures, hangs; and strangers who connect change nothing."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Finished, Running, run_command, start_command, wait_until

from megazh.cluster.launchers.lifeline import Broken, LaunchInfo, from_guard, proof

pytestmark = pytest.mark.ranks

TESTS = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("remote_driver.py")
AGAIN = "run the same command again to resume from the last checkpoint"
RANK = "import os, sys, time, signal\nrank = int(os.environ['RANK'])\n"
LOOP = "\nopen(f'ready_{rank}', 'w').close()\nwhile True: time.sleep(0.05)"
LABEL = "rank {} (stage 0, on {})"
HOST = socket.gethostname().partition(".")[0]


def command(script: str, seconds: dict[str, float] | None = None, hang: float = 0.0, starter: str = "") -> list[str]:
    settings = {"script": RANK + script, "seconds": seconds or {}, "hang_minutes": hang, "starter": starter}
    settings |= {"slurm": False, "slots": [2, 1]}
    return [sys.executable, str(DRIVER), json.dumps(settings)]


def environment() -> dict[str, str | None]:
    return {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": None}


def launch(folder: Path, script: str, **more) -> Finished:
    return run_command(command(script, **more), 60, environment(), folder)


@contextlib.contextmanager
def running(folder: Path, script: str, **more) -> Iterator[Running]:
    """Start ranks that run `script` and then loop; the block begins when each has made its file `ready_N`."""
    with start_command(command(script + LOOP, **more), environment(), folder) as started:
        wait_until(lambda: all((folder / f"ready_{rank}").exists() for rank in range(3)), 60, "all ranks ready")
        yield started


def launch_info(folder: Path) -> LaunchInfo:
    return LaunchInfo.model_validate_json((folder / "run" / "control" / "launch.json").read_text())


def test_ranks_find_their_places_and_write_where_local_ones_do(tmp_path: Path) -> None:
    script = """
import json
json.dump(dict(os.environ), open(f'{rank}.json', 'w'))
print('out', rank, '中')
print('err', rank, file=sys.stderr)
sys.stdout.write('x' + '中' * 20000)"""
    finished = launch(tmp_path, script)
    assert finished.returncode == 0, finished
    assert finished.stdout == "out 0 中\n" + "x" + "中" * 20000
    assert finished.stderr == "err 0\n"
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [values["LOCAL_RANK"] for values in found] == ["0", "1", "0"]
    assert [values["LOCAL_WORLD_SIZE"] for values in found] == ["2", "2", "1"]
    for values in found:
        assert (values["WORLD_SIZE"], values["CUDA_VISIBLE_DEVICES"], values["DS_ACCELERATOR"]) == ("3", "", "cpu")
        assert values["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3)), "all three are here"
        assert "SLURM_NODEID" not in values
    assert len({(values["MASTER_ADDR"], values["MASTER_PORT"]) for values in found}) == 1
    assert (tmp_path / "run" / "logs" / "rank_2.log").read_text().startswith(("err 2\nout 2", "out 2"))
    assert not (tmp_path / "run" / "control" / "launch.json").exists()
    assert json.loads((tmp_path / "end.json").read_text()) == [0, "done"]


SAVES = """
def save(number, _):
    time.sleep(0.5)
    open(f'saved_{rank}_{number}', 'w').close()
    sys.exit(CODE)
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1): signal.signal(number, save)"""


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGUSR1, 75, "stopped: the time limit is near (SIGUSR1)"),
    ],
)
def test_a_signal_reaches_the_ranks_as_it_is_and_lets_them_save(
    tmp_path: Path, number: signal.Signals, code: int, line: str
) -> None:
    with running(tmp_path, SAVES.replace("CODE", str(code))) as started:
        started.process.send_signal(number)
        finished = started.wait(20)
        assert started.descendants() == []
    assert finished.returncode == code, finished
    assert all((tmp_path / f"saved_{rank}_{int(number)}").exists() for rank in range(3))
    assert finished.stderr.splitlines()[-1] == f"{line}; {AGAIN}"


def test_a_killed_rank_ends_all_and_is_named_with_its_host(tmp_path: Path) -> None:
    begin = time.monotonic()
    finished = launch(tmp_path, f"if rank == 2: os.kill(os.getpid(), signal.SIGKILL)\n{LOOP}")
    assert time.monotonic() - begin < 30
    assert finished.returncode == 5
    assert finished.stderr == (
        f"error: {LABEL.format(2, HOST)} was killed by signal 9 (out of memory?); all ranks ended; its last output is "
        f"in run/logs/rank_2.log; {AGAIN}\n"
    )


def test_a_rank_that_says_what_is_wrong_is_quoted(tmp_path: Path) -> None:
    script = f"if rank == 1: print('error: no such key', file=sys.stderr); sys.exit(2)\n{LOOP}"
    finished = launch(tmp_path, script)
    assert (finished.returncode, finished.stderr) == (2, "error: no such key\n")


def test_a_guard_that_is_killed_takes_its_rank_along_and_is_named(tmp_path: Path) -> None:
    script = "if rank == 1: open('guard', 'w').write(str(os.getppid()))"
    with running(tmp_path, script) as started:
        os.kill(int((tmp_path / "guard").read_text()), signal.SIGKILL)
        finished = started.wait(30)
        assert started.descendants() == []
    assert finished.returncode == 5
    assert f"error: {LABEL.format(1, HOST)} was lost: its connection was closed" in finished.stderr


def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    with running(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)") as started:
        started.process.kill()
        wait_until(lambda: not started.descendants(), 20, "no process left")


def test_a_hang_is_found_and_the_stopped_rank_is_named(tmp_path: Path) -> None:
    script = """
from pathlib import Path
from megazh.run.pulse import beat, open_pulse
from megazh.training.hang import write_stacks_to
write_stacks_to(Path(f'run/logs/rank_{rank}.log'))
assert open_pulse()
beat('step', 4)
if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(60)"""
    finished = launch(tmp_path, script, hang=0.05)
    assert finished.returncode == 5
    (line,) = finished.stderr.splitlines()
    assert f"the others wait for {LABEL.format(1, HOST)}, which is stopped by a signal (SIGSTOP)" in line
    for rank in range(3):
        assert "\nCurrent thread" in (tmp_path / "run" / "logs" / f"rank_{rank}.log").read_text()


def test_a_program_that_starts_too_few_ranks_is_named_with_its_words(tmp_path: Path) -> None:
    finished = launch(tmp_path, "", starter="import sys; sys.exit('srun: error: no such node')")
    assert finished.returncode == 5
    assert finished.stderr == (
        "error: srun ended with exit code 1 before all ranks had been started (srun: error: no such node); its output "
        "is in run/logs/srun.log\n"
    )


def test_a_request_to_stop_while_the_other_program_still_waits_ends_it(tmp_path: Path) -> None:
    with start_command(command("", starter="import time; time.sleep(60)"), environment(), tmp_path) as started:
        wait_until((tmp_path / "run" / "control" / "launch.json").exists, 60, "the launcher waits for its ranks")
        started.process.send_signal(signal.SIGTERM)
        finished = started.wait(20)
        assert started.descendants() == []
    assert finished.returncode == 75
    assert finished.stderr.splitlines()[-1] == f"stopped: terminated (SIGTERM); {AGAIN}"


def test_what_no_guard_sends_is_refused() -> None:
    """Numbers that later code could not take, from whoever knows the token."""
    progress = {"kind": "progress", "beats": 1, "step": 0, "reason": 0, "age": 0.5, "phase": "step"}
    assert from_guard(json.dumps(progress).encode())
    for change in (
        {"reason": 99},
        {"age": float("nan")},
        {"age": -1.0},
        {"beats": True},
        {"phase": "x" * 99},
        {"x": 1},
    ):
        with pytest.raises(Broken):
            from_guard(json.dumps(progress | change).encode())
    for line in (b"", b"null", b"[]", b'{"kind": "start"}', b"\xff", b"[" * 50000):
        with pytest.raises(Broken):
            from_guard(line)


def test_strangers_and_garbage_change_nothing(tmp_path: Path) -> None:
    """Bytes that are no message, long lines, wrong proofs, a rank that is there already, connections without a word."""
    with running(tmp_path, "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))") as started:
        info = launch_info(tmp_path)
        path = tmp_path / "run" / "control" / "launch.json"
        assert path.stat().st_mode & 0o777 == 0o600
        with contextlib.ExitStack() as stack:

            def connect() -> socket.socket:
                return stack.enter_context(socket.create_connection((info.addresses[0], info.port), 10))

            def is_refused(data: bytes) -> bool:
                connection = connect()
                connection.settimeout(10)
                assert json.loads(connection.recv(4096))["attempt"] == info.attempt
                connection.sendall(data)
                with contextlib.suppress(ConnectionResetError):
                    return connection.recv(4096) == b""
                return True

            half_open = [connect() for _ in range(20)]
            hello = {"kind": "hello", "slot": 0, "proof": "0" * 64, "host": "x", "cores": [0], "port": 1}
            for data in (
                b"\0\xff\n",
                b"GET / HTTP/1.1\r\n\r\n",
                b"[" * 60000 + b"\n",
                b"{" * 100_000,
                json.dumps(hello).encode() + b"\n",
                json.dumps(hello | {"slot": 10**9}).encode() + b"\n",
                json.dumps(hello | {"host": "a\nb"}).encode() + b"\n",
                json.dumps({"kind": "goodbye", "code": 0}).encode() + b"\n",
            ):
                assert is_refused(data), data[:40]
            known = connect()
            nonce = json.loads(known.recv(4096))["nonce"]
            known.sendall(json.dumps(hello | {"proof": proof(info.token, nonce, 0)}).encode() + b"\n")
            assert known.recv(4096) == b"", "rank 0 is there already"
            assert half_open
            started.process.send_signal(signal.SIGUSR1)
            assert started.wait(20).returncode == 75
