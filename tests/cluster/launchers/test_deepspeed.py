"""Runs on several hosts, over real ssh, pdsh and DeepSpeed's launcher: a dead rank, Ctrl-C, what is refused."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from processes import run_command, wait_until
from recipes import TINY_RUN, in_sections, make_recipe
from ssh_hosts import SshHosts, why_unavailable

import megazh
from megazh.cluster.launchers.deepspeed import DeepSpeed
from megazh.errors import INTERRUPTED, UsageError, WorkerError
from megazh.run.metrics import read_metrics
from megazh.training.checkpoint_list import newest_good
from megazh.training.job import Devices, Host, Job, Launcher, Request, make_job
from megazh.training.recipe import Device

STEPS = 120
ENVIRONMENT = {"PYTHONPATH": str(Path(megazh.__file__).parents[1]), "OMP_NUM_THREADS": "1"}

on_hosts = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())


@pytest.fixture(scope="module")
def hosts() -> Iterator[SshHosts]:
    with SshHosts("node1", "node2", "node3", "node4") as hosts:
        yield hosts


@pytest.fixture
def folder(tmp_path: Path, stories: Path) -> Path:
    """A folder whose name is a trap for shells and pdsh; with a recipe, and a hostfile of two hosts."""
    folder = tmp_path / 'it\'s $HOME "x" `id` %h 实验'
    folder.mkdir()
    values = {**TINY_RUN, "steps": STEPS, "checkpoint_every": 0, "data": {"manifest": str(stories)}}
    (folder / "my recipe.yaml").write_text(yaml.safe_dump(in_sections(values)))
    (folder / "my hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    return folder


def pretrain(run: str, *options: str) -> list[str]:
    command = [sys.executable, "-m", "megazh", "pretrain", "-c", "my recipe.yaml", "-r", run, "--device", "cpu"]
    return [*command, *options]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if record["kind"] == "step"]


def wait_for_step(run: Path, step: int) -> None:
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(losses(run)) >= step, 120, f"step {step}")


@on_hosts
@pytest.mark.ranks
@pytest.mark.slow
def test_a_dead_rank_ends_all_ctrl_c_saves_and_losses_are_those_of_one_process(hosts: SshHosts, folder: Path) -> None:
    several = pretrain("a run", "-H", "my hosts", "-p", "2")

    with hosts.start("node1", several, ENVIRONMENT, folder) as running:
        wait_for_step(folder / "a run", 2)
        of_ranks = [pid for pid in hosts.processes("node2", "megazh rank") if not _is_guard(pid)]
        os.kill(of_ranks[0], signal.SIGKILL)
        finished = running.wait(30)
    assert finished.returncode == WorkerError.exit_code, finished.stderr
    last = finished.stderr.splitlines()[-1]
    assert re.match(r"error: rank [23] \(stage 1, on node2\) was killed by signal 9", last), last
    wait_until(lambda: not any(hosts.processes(name, "megazh rank") for name in hosts.names), 10, "all ranks end")

    with hosts.start("node1", several, ENVIRONMENT, folder) as running:
        wait_for_step(folder / "a run", 4)
        hosts.signal(running, signal.SIGINT)
        finished = running.wait(60)
    assert finished.returncode == INTERRUPTED, finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("interrupted; run the same command again")
    saved = newest_good(folder / "a run" / "checkpoints")
    assert saved is not None

    # mpirun goes on where DeepSpeed's launcher has left off.
    with hosts.start("node1", [*several, "--launcher", "mpirun"], ENVIRONMENT, folder) as running:
        finished = running.wait(120)
    assert finished.returncode == 0, finished.stderr
    alone = run_command(pretrain("alone", "-n", "1"), 120, ENVIRONMENT, folder)
    assert alone.returncode == 0, alone.stderr
    found = losses(folder / "a run")
    assert len(found) == STEPS
    assert found == pytest.approx(losses(folder / "alone"), abs=1e-5)


@on_hosts
@pytest.mark.ranks
@pytest.mark.slow
def test_hosts_that_cannot_work_are_named_with_the_remedy(hosts: SshHosts, folder: Path) -> None:
    python, package = Path(sys.executable).resolve(), Path(megazh.__file__).parent
    other = folder / "python"
    other.write_text('#!/bin/sh\necho \'megazh-host {"python": "3.9.2"}\'\n')
    other.chmod(0o755)
    for host, mount in {
        "node2": ["mount", "-t", "tmpfs", "none", package],
        "node3": ["mount", "--bind", "/dev/null", python],
        "node4": ["mount", "--bind", other, python],
    }.items():
        assert hosts.run(host, *mount).returncode == 0
    (folder / "my hosts").write_text("".join(f"node{number} slots=1\n" for number in range(1, 6)))
    with hosts.start(
        "node1", pretrain("a run", "-H", "my hosts", "-p", "1", "global_batch_size=5"), ENVIRONMENT, folder
    ) as running:
        finished = running.wait(120)
    for host, path in {"node2": package, "node3": python, "node4": python}.items():
        assert hosts.run(host, "umount", path).returncode == 0
    assert finished.returncode == UsageError.exit_code
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    expected = [
        rf"error: node2: does not have {re.escape(str(package))}; copy this folder there under the same path",
        rf"error: node3: has no {re.escape(sys.executable)}; make the same environment there",
        rf"error: node4: {re.escape(sys.executable)} is Python 3.9.2, here it is 3\.\d+\.\d+; make the same",
        r"error: node5: cannot be reached by ssh \(.*node5.*\); `ssh node5 true` has to work without a password",
    ]
    assert len(errors) == len(expected), finished.stderr
    for line, pattern in zip(errors, expected, strict=True):
        assert re.match(pattern, line), line


def _is_guard(pid: int) -> bool:
    return b"--started-by" in Path(f"/proc/{pid}/cmdline").read_bytes()


def job(tmp_path: Path, hosts: tuple[Host, ...], ids: tuple[str, ...] | None = None) -> Job:
    devices = Devices(Device.CUDA if ids else Device.CPU, sum(host.slots for host in hosts), ids)
    made = make_job(Request(), make_recipe(), tmp_path / "run", tmp_path, devices)
    return replace(made, hosts=hosts, launcher=Launcher.DEEPSPEED, hostfile=tmp_path / "hosts")


@pytest.fixture
def pdsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pdsh").write_text("")
    (tmp_path / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("pdsh")
def test_slots_of_the_hosts_are_chosen(tmp_path: Path) -> None:
    words = DeepSpeed().command(job(tmp_path, (Host("a", 3), Host("b", 1))), "ID")
    assert words[words.index("--include") + 1] == "a:0,1,2@b:0"
    words = DeepSpeed().command(job(tmp_path, (Host("a", 2), Host("b", 2)), ("1", "3")), "ID")
    assert words[words.index("--include") + 1] == "a:1,3@b:1,3"


def test_pdsh_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="apt-get install pdsh"):
        DeepSpeed().command(job(tmp_path, (Host("a", 2),)), "ID")


@pytest.mark.usefixtures("pdsh")
def test_what_a_remote_shell_would_take_apart_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = (Host("a", 2),)
    monkeypatch.setenv("NCCL_DEBUG_FILE", "/tmp/%h of $USER")
    with pytest.raises(UsageError, match="NCCL_DEBUG_FILE: DeepSpeed's launcher cannot hand this value on"):
        DeepSpeed().command(job(tmp_path, hosts), "ID")
    monkeypatch.setenv("NCCL_DEBUG_FILE", "/tmp/%h")
    assert DeepSpeed().environment(job(tmp_path, hosts))["NCCL_DEBUG_FILE"] == "/tmp/%%h"
    monkeypatch.setattr(sys, "executable", "/home/me/my env/bin/python")
    with pytest.raises(UsageError, match=r"/home/me/my env/bin/python: .* take --launcher mpirun"):
        DeepSpeed().command(job(tmp_path, hosts), "ID")


def test_a_host_that_ssh_has_lost_is_named() -> None:
    text = "INFO\nssh: connect to host b port 22: No route to host\npdsh@a: b: ssh exited with exit code 255"
    assert DeepSpeed().fault(text) == (
        "b: DeepSpeed's launcher there ended with exit code 255 (ssh: connect to host b port 22: No route to host)"
    )
    assert DeepSpeed().fault("INFO\nall is well") == ""
