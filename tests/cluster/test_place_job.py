"""The ranks of a job's hosts: chosen from its recipe where a launcher takes them, and said."""

from dataclasses import replace
from pathlib import Path

import pytest

from megazh.cluster.place_job import placed
from megazh.training.job import Devices, Host, Job, Launcher, Request, make_job
from megazh.training.recipe import Device, load_recipe
from megazh.training.recipe_files import recipe_path


def job(launcher: Launcher = Launcher.SRUN, network: float = 1.25, hosts: int = 2, stages: int = 2) -> Job:
    """The 0.5B on hosts of six GPUs each."""
    recipe = load_recipe(recipe_path("qwen0.5b_6x3090"))
    parallel = recipe.parallel.model_copy(update={"network_bandwidth": network})
    recipe = recipe.model_copy(update={"parallel": parallel})
    devices = Devices(Device.CUDA, 6 * hosts, None)
    made = make_job(Request(stages=stages), recipe, Path("run"), Path("data"), devices)
    return replace(made, launcher=launcher, hosts=tuple(Host(f"n{number}", 6) for number in range(hosts)))


@pytest.mark.parametrize("launcher", [Launcher.SRUN, Launcher.DEEPSPEED, Launcher.MPIRUN])
def test_with_few_stages_a_fast_network_keeps_pipelines_inside(launcher: Launcher) -> None:
    found, (line,) = placed(job(launcher, network=12.5))
    assert found.ranks_of_slots == (0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11)
    assert line.startswith(
        "placement   on 2 hosts, data parallelism crosses the hosts, pipelines stay inside: 0.18 s of "
    )


def test_the_recipe_decides_what_a_network_costs() -> None:
    found, (line,) = placed(job(stages=4))
    assert "pipeline parallelism crosses the hosts, stages stay inside" in line
    assert "10 GB/s inside a host, 1.25 GB/s between hosts" in line
    assert found.ranks_of_slots == tuple(range(12))
    assert "10 GB/s inside a host, 100 GB/s between hosts" in placed(job(network=100.0, stages=4))[1][0]


@pytest.mark.parametrize(
    "asked", [{"launcher": Launcher.LOCAL}, {"hosts": 1}, {"stages": 1}, {"stages": 12}], ids=lambda asked: str(asked)
)
def test_where_there_is_nothing_to_choose_ranks_are_slots(asked: dict) -> None:
    before = job(**asked)
    assert placed(before) == (before, [])
    assert before.ranks_of_slots == tuple(range(len(before.ranks_of_slots)))
