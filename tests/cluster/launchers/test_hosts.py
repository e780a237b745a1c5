"""Launching on several hosts: refusals, and arguments that pass through the shells of the hosts unchanged."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from processes import run_command
from recipes import make_recipe

from megazh.cluster.hostfile import Host
from megazh.cluster.launchers import hosts
from megazh.cluster.launchers.hosts import deepspeed_command
from megazh.errors import INTERRUPTED, REQUEUE, DivergedError, UsageError, WorkerError
from megazh.training.job import Devices, Request, make_job
from megazh.training.recipe import Device


def test_slots_that_a_host_has_not_are_named() -> None:
    with pytest.raises(UsageError, match="-g 4,5: host small has slots 0 to 3"):
        deepspeed_command(Path("hosts"), [Host("big", 8), Host("small", 4)], [1, 4, 5], 29500, [])


def test_several_hosts_need_pdsh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="apt-get install pdsh"):
        deepspeed_command(Path("hosts"), [Host("a", 1), Host("b", 1)], None, 29500, [])


def test_a_failed_launcher_gives_an_exit_code_and_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = make_job(Request(), make_recipe(), tmp_path / "run", tmp_path, Devices(Device.CPU, 2, None))
    monkeypatch.setattr(hosts, "command", lambda job: [sys.executable, "-c", "raise SystemExit(9)"])
    assert hosts.launch(job) == WorkerError.exit_code
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: DeepSpeed's launcher ended with exit code 9")
    monkeypatch.setattr(hosts, "command", lambda job: [sys.executable, "-c", ""])
    assert hosts.launch(job) == 0
    monkeypatch.setattr(hosts, "command", lambda job: [sys.executable, "-c", "raise SystemExit(6)"])
    assert hosts.launch(job) == DivergedError.exit_code, "no scheduler may take it for a failed machine"


def test_reasons_of_the_ranks_and_of_signals_decide_the_exit_code(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = make_job(Request(), make_recipe(), tmp_path / "run", tmp_path, Devices(Device.CPU, 2, None))
    for code in (UsageError.exit_code, REQUEUE, INTERRUPTED):
        monkeypatch.setattr(
            hosts, "command", lambda job, code=code: [sys.executable, "-c", f"raise SystemExit({code})"]
        )
        assert hosts.launch(job) == code
    for number, code in ((signal.SIGUSR1, REQUEUE), (signal.SIGHUP, INTERRUPTED)):
        script = f"import os, time; os.kill(os.getppid(), {int(number)}); time.sleep(20)"
        monkeypatch.setattr(hosts, "command", lambda job, script=script: [sys.executable, "-c", script])
        capfd.readouterr()
        assert hosts.launch(job) == code
        assert f"({number.name}); run the same command again" in capfd.readouterr().err


@pytest.mark.ranks
@pytest.mark.slow
def test_deepspeed_runs_the_command_on_each_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces ssh and pdsh by scripts that stay on this machine; the shells are real."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "ssh").write_text("#!/bin/sh\necho 127.0.0.1\n")
    (tools / "pdsh").write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n"
        "at = sys.argv.index('-w')\nhosts = sys.argv[at + 1].split(',')\nline = ' '.join(sys.argv[at + 2:])\n"
        "codes = [subprocess.run(['sh', '-c', line.replace('%n', str(n))]).returncode for n in range(len(hosts))]\n"
        "sys.exit(max(codes))\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=2\nb slots=2\n")
    awkward = ["$HOME/a b", "it's;echo", '"x" `y`']
    port = socket.create_server(("127.0.0.1", 0))
    arguments = deepspeed_command(hostfile, [Host("a", 2), Host("b", 2)], [1], port.getsockname()[1], awkward)
    port.close()
    # In place of megazh, a module that records its arguments and its rank.
    arguments[arguments.index("megazh")] = "recorder"
    (tmp_path / "recorder.py").write_text(
        "import json, os, sys\nnames = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')\n"
        "json.dump([sys.argv[1:], [os.environ[name] for name in names]], open(os.environ['RANK'] + '.json', 'w'))\n"
    )
    finished = run_command(arguments, 120, {"DS_ACCELERATOR": "cpu"}, tmp_path)
    assert finished.returncode == 0, finished.stderr
    for rank in range(2):
        recorded = json.loads((tmp_path / f"{rank}.json").read_text())
        assert recorded == [awkward, [str(rank), "2", "0", "127.0.0.1"]]
