"""The Slurm job that a process runs in, from its environment; scontrol is a stand-in here, and real in test_srun.py."""

import os
from pathlib import Path

import pytest

from megazh.cluster.slurm.job import Node, slurm_job
from megazh.errors import UsageError

SHOW = """#!/bin/sh
[ "$3" = 'n[1-2]' ] && { printf 'n1\\nn2\\n'; exit; }
[ "$2" = hostnames ] && { echo "$3"; exit; }
echo "   TRES=cpu=12,gres/gpu=9"
echo "     Nodes=n1 CPU_IDs=0-5 Mem=600 GRES=gpu:3090:6(IDX:0-5)"
echo "     Nodes=n2 CPU_IDs=0-5 Mem=600 GRES=shard:4,gpu:a100:2(IDX:0-1),gpu:h100:1(IDX:2)"
"""
ENVIRON = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_TASKS_PER_NODE": "6(x2)",
    "SLURM_JOB_CPUS_PER_NODE": "12,6",
}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "scontrol"
    path.write_text(SHOW)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return path


def test_tasks_cores_and_gpus_by_node(scontrol: Path) -> None:
    job = slurm_job(ENVIRON)
    assert job is not None
    assert job.nodes == (Node("n1", 6, 12, 6), Node("n2", 6, 6, 3))
    assert (job.tasks, job.in_step) == (12, False)


def test_without_slurm_there_is_no_job() -> None:
    assert slurm_job({}) is None
    assert slurm_job({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None


def test_a_step_is_told_from_the_script_and_an_interactive_shell(scontrol: Path) -> None:
    def in_step(number: str) -> bool:
        job = slurm_job(ENVIRON | {"SLURM_STEP_ID": number})
        return job is not None and job.in_step

    assert in_step("0")
    assert not in_step("4294967290"), "the interactive shell of salloc"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_JOB_ID", "17; rm -rf /"),
        ("SLURM_TASKS_PER_NODE", ""),
        ("SLURM_TASKS_PER_NODE", "6(x3)"),
        ("SLURM_TASKS_PER_NODE", "6(x999999),6(x999999)"),
        ("SLURM_JOB_CPUS_PER_NODE", "many"),
        ("SLURM_JOB_NODELIST", ""),
    ],
)
def test_variables_that_make_no_sense_are_refused_with_the_way_out(scontrol: Path, name: str, value: str) -> None:
    with pytest.raises(UsageError, match="--launcher local"):
        slurm_job(ENVIRON | {name: value})


def test_names_that_are_no_hosts_are_refused(scontrol: Path) -> None:
    scontrol.write_text("#!/bin/sh\necho '-n1;reboot'\n")
    with pytest.raises(UsageError, match="no host names"):
        slurm_job(ENVIRON)


def test_a_job_that_scontrol_does_not_know(scontrol: Path) -> None:
    scontrol.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    with pytest.raises(UsageError, match="Invalid job id specified"):
        slurm_job(ENVIRON)
