"""Ranks of real Slurm jobs: how they are started, and how they end together; a real run equals one process."""

import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from made_runs import write_recipe
from processes import run_command, wait_until
from slurm_cluster import SlurmCluster

from megazh.cluster.launchers.srun import check_place
from megazh.cluster.slurm.job import SlurmJob
from megazh.errors import UsageError

pytestmark = [pytest.mark.slurm, pytest.mark.ranks]

TESTS = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(TESTS), str(TESTS.parent)])
DRIVER = Path(__file__).with_name("remote_driver.py")
MEGAZH = [sys.executable, "-P", "-m", "megazh"]
RANK = (
    "import os, sys, time, signal\nrank = int(os.environ['RANK'])\nopen(f'pid_{rank}', 'w').write(str(os.getpid()))\n"
)
LOOP = "\nopen(f'ready_{rank}', 'w').close()\nwhile True: time.sleep(0.05)"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=2")


def driver(script: str, slots: list[int], **seconds: float) -> str:
    settings = {"script": RANK + script, "seconds": seconds, "hang_minutes": 0, "starter": "", "slurm": True}
    return shlex.join([sys.executable, str(DRIVER), json.dumps(settings | {"slots": slots})])


def submit(slurm: SlurmCluster, folder: Path, line: str, *options: str) -> str:
    """Submit a job that runs `line` as its script, in a folder of its own; returns its number."""
    folder.mkdir(exist_ok=True)
    (folder / "job.sh").write_text(f"#!/bin/bash\nexport OMP_NUM_THREADS=1 PYTHONPATH={shlex.quote(PATHS)}\n{line}\n")
    words = ["sbatch", "--parsable", "--output=out", "--mem-per-cpu=10", *options, "job.sh"]
    finished = slurm.run(*words, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def wait_for_ranks(folder: Path, ranks: int) -> None:
    wait_until(lambda: all((folder / f"ready_{rank}").exists() for rank in range(ranks)), 60, "all ranks ready")


def ends(folder: Path, ranks: int) -> bool:
    return not any(Path(f"/proc/{(folder / f'pid_{rank}').read_text()}").exists() for rank in range(ranks))


def code_of(slurm: SlurmCluster, job: str) -> int:
    slurm.wait_job(job, 90)
    return int(re.findall(r"ExitCode=(\d+):0", slurm.run("scontrol", "show", "job", job).stdout)[0])


def test_a_signal_to_the_script_reaches_the_ranks_of_all_nodes_and_lets_them_save(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    script = """
def save(*_):
    time.sleep(1)
    open(f'saved_{rank}_' + os.uname().nodename, 'w').close()
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)"""
    job = submit(slurm, tmp_path, f"exec {driver(script + LOOP, [2, 2])}", *TWO_NODES)
    wait_for_ranks(tmp_path, 4)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert code_of(slurm, job) == 75, (tmp_path / "out").read_text()
    assert {path.name[:7] for path in tmp_path.glob("saved_*")} == {f"saved_{rank}" for rank in range(4)}
    assert "stopped: the time limit is near (SIGUSR1)" in (tmp_path / "out").read_text()


def test_a_killed_rank_ends_its_job_alone_and_jobs_on_one_node_have_ports_of_their_own(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    script = """
open(f'port_{rank}', 'w').write(os.environ['MASTER_PORT'])
open(f'ready_{rank}', 'w').close()
while not os.path.exists('go'): time.sleep(0.05)
if rank == int(open('go').read()): os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1)"""
    folders = [tmp_path / "one", tmp_path / "two"]
    jobs = [submit(slurm, folder, f"exec {driver(script, [2, 2])}", *TWO_NODES) for folder in folders]
    for folder in folders:
        wait_for_ranks(folder, 4)
    ports = [{(folder / f"port_{rank}").read_text() for rank in range(4)} for folder in folders]
    assert len(ports[0]) == len(ports[1]) == 1
    assert ports[0] != ports[1]
    for folder, killed in zip(folders, ("3", "-1"), strict=True):
        (folder / "went").write_text(killed)
        (folder / "went").rename(folder / "go")
    begin = time.monotonic()
    assert [code_of(slurm, job) for job in jobs] == [5, 0]
    assert time.monotonic() - begin < 30
    (line,) = [line for line in (folders[0] / "out").read_text().splitlines() if line.startswith("error")]
    assert re.match(r"error: rank 3 \(stage 0, on \S+\) was killed by signal 9", line)
    assert ends(folders[0], 4)


def test_no_rank_outlives_a_killed_launcher(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = "for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)"
    submit(slurm, tmp_path, f"echo $$ > launcher; exec {driver(script + LOOP, [2, 2])}", *TWO_NODES)
    wait_for_ranks(tmp_path, 4)
    os.kill(int((tmp_path / "launcher").read_text()), signal.SIGKILL)
    wait_until(lambda: ends(tmp_path, 4), 30, "all ranks have ended")


def test_a_job_whose_nodes_another_step_holds_is_told_so(slurm: SlurmCluster, tmp_path: Path) -> None:
    held = "srun --nodes=2 --ntasks=2 bash -c 'touch held; sleep 60' &\nwhile [[ ! -f held ]]; do sleep 0.1; done"
    line = driver("", [2, 2], _BUSY_SECONDS=2)
    job = submit(slurm, tmp_path, f"{held}\n{line}\ncode=$?; kill %1; exit $code", *TWO_NODES)
    assert code_of(slurm, job) == 5
    assert "srun: another step of this Slurm job still holds its nodes after 2 s" in (tmp_path / "out").read_text()


def test_srun_needs_a_job_and_no_step_around() -> None:
    with pytest.raises(UsageError, match="no SLURM_JOB_ID"):
        check_place(None)
    with pytest.raises(UsageError, match="without srun"):
        check_place(SlurmJob("1", (), in_step=True))


@pytest.mark.slow
def test_two_stages_by_three_replicas_on_two_nodes_equal_one_process(slurm: SlurmCluster, tmp_path: Path) -> None:
    """No option names srun: a job with several nodes is started by it. The network is so slow that pipelines stay on
    their node where they fit, so that ranks lie on other slots than those of their own number."""
    recipe = {
        "seq_len": 256,
        "network_bandwidth": 1e-4,
        "steps": 4,
        "global_batch_size": 12,
        "num_gpus": 6,
        "dtype": "fp32",
        "sample_prompts": [],
    }
    write_recipe(tmp_path / "recipe's.yaml", None, **recipe, model={"tie_word_embeddings": False})
    words = [*MEGAZH, "pretrain", "-c", "recipe's.yaml", "--device", "cpu"]
    job = submit(
        slurm,
        tmp_path,
        f"{shlex.join([*words, '-r', 'apart', '-p', '2'])}",
        "--nodes=2",
        "--ntasks-per-node=3",
    )
    launch = tmp_path / "apart" / "control" / "launch.json"
    wait_until(launch.exists, 120, "the launcher has placed the ranks")
    assert json.loads(launch.read_text())["ranks"] == [0, 3, 1, 2, 5, 4]
    assert code_of(slurm, job) == 0, (tmp_path / "out").read_text()
    environ = {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    alone = run_command([*words, "-r", "alone", "-n", "1", "-p", "1"], 120, environ, tmp_path)
    assert alone.returncode == 0, alone.stderr
    losses = []
    for name in ("apart", "alone"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if record["kind"] == "step"])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    line = "on 2 hosts, data parallelism crosses the hosts, pipelines stay inside but for 1 pipeline, "
    assert line in (tmp_path / "out").read_text()
