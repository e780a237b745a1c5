"""Runs whose Slurm jobs are stopped, preempted and requeued: they go on, and come to the uninterrupted run's losses."""

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from made_runs import write_recipe
from processes import wait_until
from slurm_cluster import SlurmCluster
from slurm_jobs import TEMPLATES, log, submit

from megazh.run.folder import RunFolder

pytestmark = [pytest.mark.slurm, pytest.mark.ranks, pytest.mark.slow]

PRETRAIN = TEMPLATES / "pretrain_6x3090.sh"
STEPS = 40
SECONDS = 150
TWO_STAGES = ["pipe_parallel_size=2", "num_gpus=null"]
"""On as many CPU ranks as the job has tasks; one alone in a job computes all stages."""


class Runs:
    """Jobs in one folder, each of one rank on the CPU."""

    def __init__(self, slurm: SlurmCluster, folder: Path, manifest: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.second_has_ended = threading.Event()
        self.recipe = write_recipe(
            folder / "my recipe's.yaml",
            manifest,
            steps=STEPS,
            seq_len=128,
            global_batch_size=16,
            num_gpus=1,
            pipe_parallel_size=1,
            model={"vocab_size": 400, "hidden_size": 64},
            validation_samples=1,
        )

    def submit(self, name: str, *options: str, file: Path = PRETRAIN, more: Sequence[str | Path] = ()) -> str:
        """Submit the run `name`; returns the job's number.

        Args:
            name: run folder.
            options: options of sbatch.
            file: the file for sbatch.
            more: further words behind it.
        """
        options = ("--gres=none", "--ntasks-per-node=1", "--mem=1G", *options)
        line = ["--device", "cpu", "-c", self.recipe.name, "-r", name, *more]
        return submit(self.slurm, self.folder, *options, file, *line, environ={"OMP_NUM_THREADS": "1"})

    def losses(self, name: str) -> dict[int, float]:
        """Loss by step, so far."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return {record["step"]: record["loss"] for record in records if record["kind"] == "step"}

    def wait_for_steps(self, name: str, more: int = 3) -> None:
        """Wait until the run has got on by some steps in its present attempt."""
        before = len(self.losses(name))
        wait_until(lambda: len(self.losses(name)) >= before + more, SECONDS, f"{name}: {more} steps after {before}")

    def wait_for_start(self, name: str, job: str, start: int) -> None:
        """Wait until Slurm has started the job for the given time, counted from 0, and the run has done steps again."""
        starts = lambda: self.slurm.run("scontrol", "show", "job", job).stdout  # noqa: E731
        wait_until(lambda: f"Restarts={start}" in starts() and "RUNNING" in starts(), SECONDS, f"{name}: start {start}")
        self.wait_for_steps(name)

    def complete(self, job: str) -> str:
        """Wait for the end of a job; returns its log."""
        state = self.slurm.wait_job(job, SECONDS)
        text = log(self.folder, job)
        assert state == "COMPLETED", text
        return text


@pytest.fixture(scope="module")
def runs(slurm: SlurmCluster, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(slurm, tmp_path_factory.mktemp("runs"), stories)


@pytest.fixture(scope="module")
def logs(runs: Runs) -> Iterator[dict[str, str]]:
    """The logs of a run that is left alone, of three that are stopped, and of a second job in the folder of the first,
    all at the same time, most of them on one node."""
    with ThreadPoolExecutor() as threads:
        kinds: list[Callable[[Runs], str]] = [_alone, _stopped, _moved, _cancelled, _second]
        found = {kind.__name__: threads.submit(kind, runs) for kind in kinds}
        yield {name: future.result() for name, future in found.items()}


def _alone(runs: Runs) -> str:
    return runs.complete(runs.submit("alone", "-w", "n1"))


def _stopped(runs: Runs) -> str:
    """The time limit is near; then somebody requeues the job."""
    job = runs.submit("stopped", "-w", "n1")
    runs.wait_for_steps("stopped")
    runs.slurm.run("scancel", "--batch", "--signal=USR1", job)
    runs.wait_for_start("stopped", job, 1)
    runs.slurm.run("scontrol", "requeue", job)
    return runs.complete(job)


def _moved(runs: Runs) -> str:
    """One of two nodes fails, and the job is to go on with the other one alone; then a job of another partition takes
    one of the GPUs that it holds without using them."""
    job = runs.submit("moved", "--gres=gpu:7", file=TEMPLATES / "pretrain_2nodes.sh", more=TWO_STAGES)
    runs.wait_for_steps("moved")
    assert runs.second_has_ended.wait(SECONDS)
    runs.slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    wait_until(lambda: "PENDING" in runs.slurm.run("scontrol", "show", "job", job).stdout, 30, "moved: requeued")
    runs.slurm.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    for change in ("numtasks=1", "numnodes=1-1", "numcpus=2"):
        assert runs.slurm.run("scontrol", "update", f"jobid={job}", change).returncode == 0
    runs.wait_for_start("moved", job, 1)
    runs.slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    node = runs.slurm.run("squeue", "-h", "-j", job, "-o", "%N").stdout.strip()
    urgent = runs.slurm.run(
        "sbatch", "--parsable", "-p", "urgent", "-w", node, "--gres=gpu:1", "-o", "/dev/null", "--wrap", "true"
    ).stdout.strip()
    runs.slurm.wait_job(urgent)
    return runs.complete(job)


def _cancelled(runs: Runs) -> str:
    job = runs.submit("cancelled", "-w", "n1")
    runs.wait_for_steps("cancelled")
    runs.slurm.run("scancel", job)
    assert runs.slurm.wait_job(job) == "CANCELLED"
    wait_until(lambda: "Slurm's decision" in log(runs.folder, job), 20, "the run has ended")
    return log(runs.folder, job)


def _second(runs: Runs) -> str:
    """A job on another node in the folder of a run that is under way."""
    wait_until((runs.folder / "alone" / "run.json").exists, SECONDS, "the run has begun")
    job = runs.submit("alone", "-w", "n2")
    state = runs.slurm.wait_job(job, SECONDS)
    runs.second_has_ended.set()
    assert state == "FAILED"
    assert "ExitCode=4:0" in runs.slurm.run("scontrol", "show", "job", job).stdout
    return log(runs.folder, job)


@pytest.mark.parametrize("name", ["stopped", "moved"])
def test_a_requeued_run_comes_to_the_same_losses(runs: Runs, logs: dict[str, str], name: str) -> None:
    assert runs.losses(name) == pytest.approx(runs.losses("alone"), rel=0 if name == "stopped" else 1e-4)
    assert sorted(runs.losses(name)) == list(range(1, STEPS + 1))
    attempts = RunFolder(runs.folder / name).info().attempts
    assert [attempt.restarts for attempt in attempts] == [0, 1, 2]
    assert len({attempt.job for attempt in attempts}) == 1
    assert f"{name}: complete, {STEPS} steps" in logs[f"_{name}"], "a requeued job goes on with the same log"


def test_the_run_requeues_its_job_at_the_time_limit_alone(logs: dict[str, str]) -> None:
    assert logs["_stopped"].count("requeueing Slurm job") == 1
    assert logs["_stopped"].count("whether it starts again is Slurm's decision") == 1
    assert "requeueing" not in logs["_moved"]
    assert "Slurm job" not in logs["_alone"]


def test_a_job_that_comes_back_with_fewer_ranks_says_so(logs: dict[str, str]) -> None:
    assert "layout      2 CPU processes = 2 stages x 1 replicas" in logs["_moved"]
    line = "--allow-relayout: 1 GPUs (the run had 2): 1 stages x 1 replicas, micro_batch_size=2"
    assert logs["_moved"].count(line) == 1


def test_a_cancelled_job_stays_cancelled(runs: Runs, logs: dict[str, str]) -> None:
    assert "requeueing" not in logs["_cancelled"]
    (attempt,) = RunFolder(runs.folder / "cancelled").info().attempts
    assert attempt.exit_code == 75


def test_a_second_job_in_the_folder_of_a_run_says_which_one_has_it(runs: Runs, logs: dict[str, str]) -> None:
    job = RunFolder(runs.folder / "alone").info().attempts[0].job
    line = rf"error: alone: another job is training in this folder \(held by process \d+ on n1, Slurm job {job}\)"
    assert re.search(line, logs["_second"])
    assert "requeueing" not in logs["_second"]
    assert len(RunFolder(runs.folder / "alone").info().attempts) == 1


@pytest.mark.usefixtures("logs")
def test_the_files_for_fine_tuning_run_to_their_end(runs: Runs, tmp_path: Path) -> None:
    chats = tmp_path / "my chats.jsonl"
    rows = [{"instruction": f"小明有{number}顶帽子吗？", "output": "有。"} for number in range(40)]
    chats.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    more = ["-i", chats, "max_steps=2", "checkpoint.initial_checkpoint=alone", "warmup=1"]
    jobs = {
        name: runs.submit(name, file=TEMPLATES / f"{name}_6x3090.sh", more=[*more, *lora])
        for name, lora in {"finetune": [], "longlora": ["lora.rank=2"]}.items()
    }
    for name, job in jobs.items():
        assert f"{name}: complete, 2 steps" in runs.complete(job)
