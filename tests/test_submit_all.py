"""`jobs/submit_all.sh` on a private Slurm cluster: the chain's commands, their order, a failure, a second call."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Finished
from slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "jobs" / "submit_all.sh"
RECORDER = f"""#!/bin/bash
[[ $1 == - || " $* " == *" slurm "* ]] && exec {sys.executable} "$@"
printf '%s\\0' "$SLURM_JOB_NAME" "$@" >> recorded
printf '\\n' >> recorded
[[ $* == *--epochs=13* ]] && exit 3
exit 0
"""
STAGES = ["index", "pretrain", "sft", "longlora", "evaluate", "position-loss"]
# No GPU is asked for, and one task each: the stand-in for Python would not share the work.
SMALL = ["--sbatch", "gres=none", "ntasks-per-node=1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with data, of which a shell would take one name apart, and a Python that records its arguments."""
    (tmp_path / "raw").mkdir()
    for name in ("raw/a.jsonl", "it's $(chat).jsonl", "long.jsonl", "books.txt", "tokenizer.json"):
        (tmp_path / name).write_text("{}\n")
    python = tmp_path / "python"
    python.write_text(RECORDER)
    python.chmod(0o755)
    return tmp_path


class Chain:
    """Calls of the script in a folder."""

    def __init__(self, slurm: SlurmCluster, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder

    def submit(self, *more: str, name: str = "laws") -> Finished:
        """Submit the chain."""
        data = ["--text", "raw/*", "--tokenizer", "tokenizer.json", "--conversations", "it's $(chat).jsonl"]
        data += ["--long-conversations", "long.jsonl", "--long-documents", "books.txt", "--name", name, *SMALL]
        python = f"MEGAZH_PYTHON={self.folder / 'python'}"
        return self.slurm.run("env", python, "bash", SCRIPT, *data, *more, cwd=self.folder)

    def jobs(self, name: str = "laws") -> dict[str, str]:
        """Number of the newest job of each stage."""
        values = json.loads((self.folder / "runs" / f"{name}.chain.json").read_text())
        return {each["stage"]: each["job"] for each in values["jobs"]}

    def logs(self) -> str:
        """What Slurm says of the jobs, and what they have printed."""
        jobs = self.slurm.run("squeue", "-h", "-t", "all", "-o", "%i %j %T %r %N").stdout
        details = [self.slurm.run("scontrol", "show", "job", job).stdout for job in self.jobs().values()]
        codes = [re.findall(r"ExitCode=\S+", text) for text in details]
        return "\n".join([jobs, str(codes), *(f"{path}: {path.read_text()}" for path in self.folder.glob("*.out"))])

    def recorded(self) -> Iterator[list[str]]:
        """Name of the job, and arguments of Python, for each call."""
        for line in (self.folder / "recorded").read_text().split("\0\n")[:-1]:
            yield line.split("\0")


@pytest.fixture
def chain(slurm: SlurmCluster, folder: Path) -> Chain:
    """The script in `folder`, on a cluster."""
    return Chain(slurm, folder)


@pytest.mark.slurm
def test_all_stages_in_order_with_what_each_needs(chain: Chain) -> None:
    options = ["pretrain:time=3-00:00:00", "comment=a $(b) c", "--add", "pretrain:steps=5", "sft:--epochs=2"]
    finished = chain.submit(*options)
    assert finished.returncode == 0, finished.stderr
    jobs = chain.jobs()
    assert list(jobs) == STAGES
    assert f"scancel {' '.join(jobs.values())}\n" in finished.stdout
    assert "megazh slurm status runs/laws\n" in finished.stdout
    for stage, before in zip(STAGES[1:], ["index", "pretrain", "sft", "longlora", "longlora"], strict=True):
        assert f"{stage:<14}job {jobs[stage]}, after {jobs[before]}: " in finished.stdout
    (limit,) = (chain.slurm.run("squeue", "-h", "-j", jobs["pretrain"], "-o", "%l").stdout.split(),)
    assert limit == ["3-00:00:00"]
    again = chain.submit(*options)
    assert again.returncode == 0, again.stderr
    assert chain.jobs() == jobs, "nothing is submitted twice"
    assert re.search(
        rf"^evaluate      (job {jobs['evaluate']} is|done by job {jobs['evaluate']}: )", again.stdout, re.M
    )
    for stage in STAGES:
        assert chain.slurm.wait_job(jobs[stage]) == "COMPLETED", chain.logs()
    calls = {name.removeprefix("laws-"): arguments for name, *arguments in chain.recorded()}
    assert [name for name, *_ in chain.recorded()][:4] == [f"laws-{stage}" for stage in STAGES[:4]]
    assert calls["index"][1:] == [
        str(ROOT / "tools" / "index_dataset.py"),
        *["--input", "raw/*", "--tokenizer", "tokenizer.json", "--output", "data_index/laws"],
    ]
    tail = ["-c", "qwen0.5b_6x3090", "-r", "runs/laws", "data.manifest=data_index/laws", "steps=5"]
    assert calls["pretrain"][-len(tail) :] == tail
    base = "checkpoint.initial_checkpoint=runs/laws"
    tail = ["-r", "runs/laws-sft", base, "--epochs=2", "-i", "it's $(chat).jsonl"]
    assert calls["sft"][-len(tail) :] == tail
    tail = ["-r", "runs/laws-longlora", f"{base}-sft", "-i", "long.jsonl"]
    assert calls["longlora"][-len(tail) :] == tail
    figures = ["--json", "runs/laws-longlora/passkey.json"]
    assert calls["evaluate"][-9:] == [
        "passkey",
        "runs/laws-longlora",
        "--lengths",
        "1024",
        "2048",
        "4096",
        "8192",
        *figures,
    ]
    assert calls["position-loss"][-5:-2] == ["position-loss", "runs/laws-longlora", "books.txt"]


@pytest.mark.slurm
def test_a_stage_that_fails_cancels_the_rest_and_again_submits_it(chain: Chain) -> None:
    shorter, stages = ["--without", "longlora", "--add"], [stage for stage in STAGES if stage != "longlora"]
    failing = [*shorter, "sft:--epochs=13"]
    assert chain.submit(*failing).returncode == 0
    jobs = chain.jobs()
    states = [chain.slurm.wait_job(jobs[stage]) for stage in stages]
    assert states == ["COMPLETED", "COMPLETED", "FAILED", "CANCELLED", "CANCELLED"], chain.logs()
    same = chain.submit(*failing)
    assert (same.returncode, chain.jobs()) == (2, jobs)
    assert f"sft: job {jobs['sft']} has ended as FAILED, and runs/laws-sft is not complete" in same.stderr
    other = chain.submit(*shorter, "sft:--epochs=2")
    assert (other.returncode, chain.jobs()) == (2, jobs)
    assert f"sft: was submitted as job {jobs['sft']} with another command: without --epochs=13 with" in other.stderr
    again = chain.submit(*shorter, "sft:--epochs=2", "--again", *stages[2:])
    assert again.returncode == 0, again.stderr
    assert f"pretrain      done by job {jobs['pretrain']}: runs/laws" in again.stdout
    newest = chain.jobs()
    assert [newest[stage] == jobs[stage] for stage in stages] == [True, True, False, False, False]
    assert {chain.slurm.wait_job(newest[stage]) for stage in stages} == {"COMPLETED"}, chain.logs()


@pytest.mark.slurm
def test_a_dry_run_shows_the_commands_that_are_run(chain: Chain) -> None:
    finished = chain.submit("--dry-run")
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines.pop() == "dry run: nothing was submitted"
    commands = [shlex.split(line)[1:] for line in lines]
    assert [line.split()[0] for line in lines] == STAGES
    assert all(command[:2] == ["sbatch", "--parsable"] for command in commands)
    assert commands[2][3:5] == ["--dependency=afterok:JOB_OF_PRETRAIN", "--kill-on-invalid-dep=yes"]
    assert commands[2][-2:] == ["-i", "it's $(chat).jsonl"]
    assert not (chain.folder / "runs").exists()
    assert chain.slurm.run("squeue", "-h", "--name=laws-index").stdout == ""


@pytest.mark.slurm
def test_a_refusal_of_sbatch_keeps_what_was_submitted(chain: Chain) -> None:
    finished = chain.submit("--sbatch", "sft:partition=nowhere", "hold", name="held")
    assert finished.returncode == 5
    assert re.search(
        r"sbatch --job-name=held-sft: .*[Ii]nvalid partition.*the same command again goes on", finished.stderr
    )
    jobs = chain.jobs("held")
    assert list(jobs) == ["index", "pretrain"]
    assert chain.slurm.run("scancel", *jobs.values()).returncode == 0
