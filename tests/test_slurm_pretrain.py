"""`slurm/pretrain_6x3090.sh` on a private Slurm cluster: its resources, the command that it starts, a complete run."""

import json
import re
import sys
from pathlib import Path

import pytest
from processes import wait_until
from slurm_cluster import SlurmCluster

from megazh.cluster.launchers import local

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "slurm" / "pretrain_6x3090.sh"
RECORDER = f"""#!/bin/bash
[[ $1 == - ]] && exec {sys.executable} "$@"
trap 'touch signalled; exit 75' USR1
printf '%s\\n' "$CUDA_VISIBLE_DEVICES" "$@" > arguments
[[ $* == *wait* ]] && for _ in {{1..300}}; do sleep 0.1; done
exit 0
"""


def submit(slurm: SlurmCluster, folder: Path, *line: str | Path, environ: dict[str, str] | None = None) -> str:
    """Submit a job from `folder`; returns its number."""
    names = ",".join(["ALL", *(f"{name}={value}" for name, value in (environ or {}).items())])
    finished = slurm.run("sbatch", "--parsable", f"--export={names}", *line, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.fixture
def recording_python(tmp_path: Path) -> dict[str, str]:
    """The environment of a job whose Python only records its arguments."""
    python = tmp_path / "python"
    python.write_text(RECORDER)
    python.chmod(0o755)
    return {"MEGAZH_PYTHON": str(python)}


@pytest.mark.slurm
@pytest.mark.parametrize(("request_line", "gpus"), [([], "0,1,2,3,4,5"), (["--gres=none"], "")])
def test_it_takes_six_gpus_or_none(
    slurm: SlurmCluster, tmp_path: Path, recording_python: dict[str, str], request_line: list[str], gpus: str
) -> None:
    job = submit(slurm, tmp_path, *request_line, SCRIPT, "-c", "demo", environ=recording_python)
    log = tmp_path / f"slurm-pretrain-{job}.out"
    assert slurm.wait_job(job) == "COMPLETED", log.read_text()
    visible, *arguments = (tmp_path / "arguments").read_text().splitlines()
    assert visible == gpus
    # If an option is given twice, the later one counts.
    assert arguments == ["-P", "-m", "megazh", "pretrain", "-t", "ds_pp", "-c", "qwen0.5b_6x3090", "-c", "demo"]


@pytest.mark.slurm
def test_a_copy_is_found_from_the_repository_only(
    slurm: SlurmCluster, tmp_path: Path, recording_python: dict[str, str]
) -> None:
    copy = tmp_path / "mine.sh"
    copy.write_bytes(SCRIPT.read_bytes())
    job = submit(slurm, tmp_path, "--gres=none", copy, environ=recording_python)
    assert slurm.wait_job(job) == "FAILED"
    log = (tmp_path / f"slurm-pretrain-{job}.out").read_text()
    assert log == "error: cannot find jobs/run_pretrain.sh; call sbatch in the folder of the repository\n"
    job = submit(
        slurm, ROOT, "--gres=none", f"--chdir={tmp_path}", f"--output={tmp_path}/log", copy, environ=recording_python
    )
    assert slurm.wait_job(job) == "COMPLETED", (tmp_path / "log").read_text()


def test_the_ranks_get_ten_minutes_to_save() -> None:
    """20 GB to a disk of 100 MB/s take more than three, and the launcher would wait for fifteen."""
    (seconds,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    assert 600 <= int(seconds) <= local._SAVE_SECONDS


@pytest.mark.slurm
def test_the_signal_before_the_end_reaches_the_launcher(
    slurm: SlurmCluster, tmp_path: Path, recording_python: dict[str, str]
) -> None:
    job = submit(slurm, tmp_path, "--gres=none", SCRIPT, "wait", environ=recording_python)
    wait_until((tmp_path / "arguments").exists, 30, "the job has started")
    assert slurm.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    assert slurm.wait_job(job) == "FAILED", "with the exit code of the run"
    assert (tmp_path / "signalled").exists()
    assert "ExitCode=75:0" in slurm.run("scontrol", "show", "job", job).stdout


@pytest.mark.slurm
@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_to_its_end(slurm: SlurmCluster, tmp_path: Path) -> None:
    options = ["--device", "cpu", "-c", "demo", "-n", "2", "steps=3", "data.stories=300"]
    environ = {"MEGAZH_PYTHON": sys.executable}
    job = submit(slurm, tmp_path, "--gres=none", SCRIPT, *options, environ=environ)
    log = tmp_path / f"slurm-pretrain-{job}.out"
    assert slurm.wait_job(job, timeout=240) == "COMPLETED", log.read_text()
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2, 3]
    assert metrics.parent == tmp_path / "runs" / "demo"
    assert (metrics.parent / "checkpoints" / "step_00000003" / "manifest.json").exists()
    assert "runs/demo: complete, 3 steps" in log.read_text()
    # The same job, submitted again, finds the run complete.
    job = submit(slurm, tmp_path, "--gres=none", SCRIPT, *options, environ=environ)
    assert slurm.wait_job(job, timeout=120) == "COMPLETED"
    again = (tmp_path / f"slurm-pretrain-{job}.out").read_text()
    assert "runs/demo: complete, 3 steps" in again
    assert "step 1/3" not in again
