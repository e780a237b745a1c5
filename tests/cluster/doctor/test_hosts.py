"""All hosts of a job: nodes of a real Slurm job, hosts of a real ssh, and what differs between them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import Finished, run_command
from slurm_cluster import SlurmCluster
from ssh_hosts import SshHosts, why_unavailable

from megazh.cluster.doctor.hosts import compare
from megazh.cluster.doctor.messages import Assembler, send
from megazh.cluster.doctor.reach import by_srun
from megazh.cluster.doctor.report import VERSION, Found, Report, Verdict
from megazh.errors import UsageError

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "megazh", "doctor", "--json"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def report(host: str, cards: tuple[str, ...] = (), **facts: str) -> Report:
    """A report without findings."""
    found = Found()
    found.cards += cards
    found.facts |= facts
    return found.report(host, 1.0)


def texts(finished: Finished) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The JSON that was printed, and verdict and text of each comparison."""
    found = json.loads(finished.stdout)
    assert found["version"] == VERSION
    return found, [(each["verdict"], each["text"]) for each in found["across"]]


def test_differences_name_the_hosts_of_each_value() -> None:
    reports = [report("a", torch="2.11.0", linux="6.1"), report("b", torch="2.13.0", linux="6.8")]
    linux, torch = compare([*reports, report("c", torch="2.11.0", linux="6.1")])
    assert (torch.verdict, torch.text) == (Verdict.BAD, "torch differs: 2.11.0 on a, c; 2.13.0 on b")
    assert (linux.verdict, linux.text) == (Verdict.WARNING, "linux differs: 6.1 on a, c; 6.8 on b")
    (fine,) = compare([report("a", torch="2.11.0"), report("b", torch="2.11.0")])
    assert fine.verdict is Verdict.OK
    missing = compare([report("a", nccl="2.28.9"), report("b")])
    assert missing[0].text == "nccl differs: 2.28.9 on a; unknown on b"
    assert compare([report("a", torch="2.11.0")]) == []


def test_different_cards_are_a_warning() -> None:
    found = compare([report("a", ("RTX 3090",) * 6, torch="1"), report("b", ("RTX 3090",) * 5, torch="1")])
    assert (found[-1].verdict, found[-1].text) == (
        Verdict.WARNING,
        "GPUs differ: a has 6 x RTX 3090; b has 5 x RTX 3090",
    )


def test_long_messages_come_through_lines_of_other_programs(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"text": "微" * 3000, "number": 1}
    send("report", value)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 600
    assembler = Assembler()
    assembler.add("@report 1 2 {")  # a message that was cut off
    found = [message for line in lines for message in (assembler.add("Welcome to gpu1!"), assembler.add(line))]
    assert [message for message in found if message] == [("report", value)]
    for line in ("@report 2 2 {}", "@report 1 99999 {}", "@report 1 1 {", "@report 1 1 []", "@x", ""):
        assert assembler.add(line) is None


def test_srun_outside_of_a_job_is_refused() -> None:
    with pytest.raises(UsageError, match="salloc"):
        by_srun({})
    with pytest.raises(UsageError, match="no number of nodes"):
        by_srun({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2; reboot"})


@pytest.mark.slurm
def test_two_nodes_of_a_job_are_compared(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = ["salloc", "--quiet", "-N", "2", "--ntasks-per-node=3", "--gres=gpu:2", *COMMAND, "--srun", "-r", tmp_path]
    finished = slurm.run(*map(str, job), timeout=150)
    assert finished.returncode == 0, finished
    found, across = texts(finished)
    assert sorted(each["host"] for each in found["hosts"]) == ["n1", "n2"]
    assert across[0][1].startswith("2 hosts reach one another")
    assert across[-1] == ("ok", "equal on all 2 hosts: deepspeed, linux, megazh, python, torch, triton")
    assert found["between"][0]["send_gb_s"] > 0
    assert list(tmp_path.iterdir()) == [], "the files of the hosts are removed"


@pytest.mark.ranks
@pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())
def test_hosts_by_ssh_one_without_the_disk_and_one_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "it's shared"
    folder.mkdir()
    with SshHosts("one", "two") as hosts:
        hostfile = hosts.hostfile(tmp_path / "hosts", 1, ("one", "two", "gone"))
        assert hosts.run("two", "mount", "-t", "tmpfs", "none", folder).returncode == 0
        command = [*COMMAND, "--hostfile", hostfile, "-r", folder, "--limit", "60"]
        with hosts.start("one", command, ENVIRONMENT) as running:
            finished = running.wait(180)
    assert finished.returncode == 5, finished
    found, across = texts(finished)
    assert [each["host"] for each in found["hosts"]] == ["one", "two"]
    bad = [text for verdict, text in across if verdict == "bad"]
    assert any(text.startswith("gone: ssh: Could not resolve") for text in bad), bad
    assert f"one to two: its file in {folder} is not seen: that is no shared disk" in bad
    assert found["between"][0]["send_gb_s"] > 0


def test_a_hostfile_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    finished = run_command([*COMMAND, "--hostfile", tmp_path / "no hosts"], 60, ENVIRONMENT)
    assert finished.returncode == 2
    assert "no such file" in finished.stderr
