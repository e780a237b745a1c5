"""A run on two nodes whose pipelines stay inside of the nodes: other ranks than slots, and one process's losses."""

import json
from pathlib import Path

import pytest
from made_runs import write_recipe
from processes import wait_until
from slurm_cluster import SlurmCluster
from slurm_jobs import TEMPLATES, log, submit

PRETRAIN = TEMPLATES / "pretrain_6x3090.sh"


def losses(run: Path) -> dict[int, float]:
    """Loss by step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "step"}


def ranks(run: Path) -> list[int]:
    """Ranks of the slots, once the launcher has recorded them."""
    path = run / "control" / "launch.json"
    return json.loads(path.read_text())["ranks"] if path.exists() else []


@pytest.mark.slurm
@pytest.mark.ranks
@pytest.mark.slow
def test_pipelines_inside_of_two_nodes_give_the_losses_of_one_process(
    slurm: SlurmCluster, tmp_path: Path, stories: Path
) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", stories, steps=3, seq_len=256, model={"vocab_size": 400})
    line = ["--device", "cpu", "-c", recipe, "parallel.network_bandwidth=0.0001"]
    environ = {"OMP_NUM_THREADS": "1"}
    small = ("--gres=none", "--mem=1G")
    four = ["-N", "2", "--ntasks-per-node=2", *small, PRETRAIN, *line, "-r", "four", "-p", "2"]
    job = submit(slurm, tmp_path, *four, environ=environ)
    assert wait_until(lambda: ranks(tmp_path / "four"), 120, "the launcher has placed the ranks") == [0, 2, 1, 3]
    assert slurm.wait_job(job, 180) == "COMPLETED", log(tmp_path, job)
    assert "data parallelism crosses the hosts, pipelines stay inside: " in log(tmp_path, job)
    one = ["--ntasks-per-node=1", *small, PRETRAIN, *line, "-r", "one", "-p", "1"]
    job = submit(slurm, tmp_path, *one, environ=environ)
    assert slurm.wait_job(job, 120) == "COMPLETED", log(tmp_path, job)
    assert list(losses(tmp_path / "one")) == [1, 2, 3]
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
