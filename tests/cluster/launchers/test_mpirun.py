"""The command for mpirun, by the implementation that it belongs to; a run with it is in test_deepspeed.py."""

from dataclasses import replace
from pathlib import Path

import pytest
from recipes import make_recipe

from megazh.cluster.launchers.mpirun import MpiRun
from megazh.errors import UsageError
from megazh.training.job import Devices, Host, Job, Launcher, Request, make_job
from megazh.training.recipe import Device

TWO = (Host("a", 2), Host("b", 2))


@pytest.fixture
def mpirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An mpirun that is first in PATH, whose --version is in the file `version`."""
    program = tmp_path / "mpirun"
    program.write_text(f"#!/bin/sh\nexec /bin/cat '{tmp_path}/version'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return program


def job(tmp_path: Path, hosts: tuple[Host, ...], ids: tuple[str, ...] | None = None) -> Job:
    devices = Devices(Device.CUDA if ids else Device.CPU, sum(host.slots for host in hosts), ids)
    made = make_job(Request(), make_recipe(), tmp_path / "run", tmp_path, devices)
    return replace(made, hosts=hosts, launcher=Launcher.MPIRUN, hostfile=tmp_path / "hosts")


def test_mpich_and_open_mpi_get_the_hosts(mpirun: Path, tmp_path: Path) -> None:
    (tmp_path / "version").write_text("HYDRA build details:\n    Version:      5.0.2\n")
    words = MpiRun().command(job(tmp_path, TWO), "ID")
    assert words[:5] == [str(mpirun), "-n", "4", "-hosts", "a:2,b:2"]
    assert words[-4:] == ["--started-by", "mpirun", "--attempt", "ID"]
    (tmp_path / "version").write_text("mpirun (Open MPI) 4.1.4\n")
    words = MpiRun().command(job(tmp_path, TWO), "ID")
    assert words[:5] == [str(mpirun), "-n", "4", "--host", "a:2,b:2"]
    assert words[words.index("PATH") - 1] == "-x"
    assert "--host" not in MpiRun().command(job(tmp_path, (Host("localhost", 2),)), "ID")


def test_chosen_gpus_are_those_that_ranks_see(tmp_path: Path) -> None:
    assert MpiRun().environment(job(tmp_path, TWO, ("1", "3")))["CUDA_VISIBLE_DEVICES"] == "1,3"


def test_another_mpirun_is_refused(mpirun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").write_text("1.0\n")
    with pytest.raises(UsageError, match=f"{mpirun}: is neither MPICH's nor Open MPI's mpirun"):
        MpiRun().command(job(tmp_path, TWO), "ID")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    with pytest.raises(UsageError, match="there is no mpirun"):
        MpiRun().command(job(tmp_path, TWO), "ID")
