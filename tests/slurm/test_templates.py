"""The files of slurm/ on a private Slurm cluster: resources, arguments, signals, where they find the repository."""

import os
import re
import shutil
from pathlib import Path

import pytest
from processes import run_command, wait_until
from slurm_cluster import SlurmCluster
from slurm_jobs import RUNS, TEMPLATES, log, recorded, recorder, submit

from megazh.cluster.launchers.supervisor import SAVE_SECONDS

FIRST = {
    "pretrain_6x3090": ["pretrain", "-t", "ds_pp", "-c", "qwen0.5b_6x3090"],
    "finetune_6x3090": ["finetune", "-t", "normal", "-c", "sft_qwen0.5b_6x3090"],
    "longlora_6x3090": ["finetune", "-t", "long_context", "-c", "longlora_qwen0.5b_6x3090"],
    "pretrain_2nodes": ["pretrain", "-t", "ds_pp", "-c", "qwen0.5b_6x3090", "--allow-relayout"],
}
ODD = ["-c", 'my recipe\'s "best".yaml', "max_steps=100", "-r", "$(touch evil)", "a='b\n c'", "", "`touch evil`;&|*"]
ODD_NAME = "a b/../$(touch evil);'\"&"


def file(name: str) -> Path:
    return TEMPLATES / f"{name}.sh"


@pytest.mark.slurm
def test_each_takes_six_gpus_and_hands_on_its_arguments(slurm: SlurmCluster, tmp_path: Path) -> None:
    """On each node. All are submitted at once, each from a folder of its own, with an odd name and no home."""
    python, jobs = recorder(tmp_path), {}
    environ = {"HOME": "/nonexistent"}
    for name in RUNS:
        for more in ([], ODD) if name == RUNS[0] else (ODD,):
            folder = tmp_path / f"{name} {len(more)}"
            folder.mkdir()
            jobs[submit(slurm, folder, "-J", ODD_NAME, file(name), *more, environ=environ, python=python)] = name, more
    for job, (name, more) in jobs.items():
        folder = tmp_path / f"{name} {len(more)}"
        assert slurm.wait_job(job) == "COMPLETED", log(folder, job)
        visible, requeues, arguments = recorded(folder)
        assert (len(visible.split(",")), requeues) == (6, "3")
        # If an option is given twice, the later one counts.
        assert arguments == ["-P", "-m", "megazh", *FIRST[name], *more]
        assert not (folder / "evil").exists()


@pytest.mark.slurm
def test_a_node_without_gpus(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "--gres=none", file("pretrain_6x3090"), "-c", "demo", python=recorder(tmp_path))
    assert slurm.wait_job(job) == "COMPLETED", log(tmp_path, job)
    assert recorded(tmp_path)[0] == ""


@pytest.mark.slurm
def test_a_copy_is_found_from_the_repository_only(slurm: SlurmCluster, tmp_path: Path) -> None:
    copy, python = tmp_path / "mine.sh", recorder(tmp_path)
    copy.write_bytes(file("pretrain_6x3090").read_bytes())
    lost = submit(slurm, tmp_path, "--gres=none", copy, python=python)
    where = f"--chdir={tmp_path}", f"--output={tmp_path}/log"
    found = submit(slurm, TEMPLATES.parent, "--gres=none", *where, copy, python=python)
    assert slurm.wait_job(lost) == "FAILED"
    assert log(tmp_path, lost) == "error: cannot find slurm/common.sh; call sbatch in the folder of the repository\n"
    assert slurm.wait_job(found) == "COMPLETED", (tmp_path / "log").read_text()


@pytest.mark.slurm
def test_the_signal_before_the_end_reaches_the_run(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "--gres=none", file("pretrain_6x3090"), "wait", python=recorder(tmp_path))
    wait_until((tmp_path / "arguments").exists, 30, "the job has started")
    assert slurm.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    assert slurm.wait_job(job) == "FAILED", "with the exit code of the run"
    assert (tmp_path / "signalled").exists()
    assert "ExitCode=75:0" in slurm.run("scontrol", "show", "job", job).stdout


@pytest.mark.parametrize("name", RUNS)
def test_without_slurm_and_from_any_folder(name: str, tmp_path: Path) -> None:
    finished = run_command(
        ["bash", os.path.relpath(file(name), tmp_path), *ODD],
        env={"MEGAZH_PYTHON": str(recorder(tmp_path))},
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    assert recorded(tmp_path)[2] == ["-P", "-m", "megazh", *FIRST[name], *ODD]


def test_what_belongs_to_a_cluster_goes_to_a_file_of_its_own(tmp_path: Path) -> None:
    """Its commands may fail, or use variables that are not set, as those of modules do."""
    shutil.copytree(TEMPLATES, tmp_path / "slurm")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "run_pretrain.sh").write_text('echo "$IMAGE" "$@"\n')
    (tmp_path / "slurm" / "site.sh").write_text("false\n: $NO_SUCH_VARIABLE\ncontainer=(env 'IMAGE=a b')\n")
    finished = run_command(["bash", tmp_path / "slurm" / "pretrain_6x3090.sh", "x y"])
    assert finished.stdout == "a b -t ds_pp -c qwen0.5b_6x3090 x y\n", finished.stderr


def test_the_ranks_get_ten_minutes_to_save() -> None:
    """20 GB to a disk of 100 MB/s take more than three, and the launcher would wait for fifteen."""
    for name in RUNS:
        (seconds,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", file(name).read_text(), re.MULTILINE)
        assert 600 <= int(seconds) <= SAVE_SECONDS


def test_what_the_files_share_is_in_one_file() -> None:
    """All but the lines that find it, which are the same in each."""
    heads = set()
    for path in sorted(TEMPLATES.glob("*.sh")):
        text = path.read_text()
        if path.name != "common.sh":
            assert text.count(path.name) >= 2, f"{path.name}: an example, and where the original is"
            heads.add(text[text.index("set -euo") : text.index("source ")].replace(path.name, "FILE"))
    assert len(heads) == 1
