"""Start the ranks of a job by `mpirun`: that of MPICH (Hydra, which Intel MPI has as well) or that of Open MPI."""

import os
import shutil
import subprocess
import sys
import sysconfig
from enum import Enum

from megazh.cluster.hostfile import is_this_machine
from megazh.cluster.launchers.reach import check_hosts
from megazh.cluster.launchers.transport import Transport, rank_arguments
from megazh.errors import UsageError
from megazh.training.job import Job, Launcher

_VERSION_SECONDS = 30.0
# What ranks on other hosts need of this process's environment; Hydra hands on all of it by itself.
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHON", "NCCL_", "GLOO_", "CUDA_", "UCX_", "HF_", "OMP_NUM_THREADS")


class _Kind(Enum):
    HYDRA = "Hydra"
    OPEN_MPI = "Open MPI"


class MpiRun(Transport):
    """mpirun. Without a hostfile all ranks are on this machine."""

    name = Launcher.MPIRUN

    def command(self, job: Job, attempt: str) -> list[str]:
        """See `Transport.command`."""
        program = _program()
        kind = _kind(program)
        several = not is_this_machine(job.hosts)
        words = [program, "-n", str(job.layout.ranks)]
        hosts = ",".join(f"{host.name}:{host.slots}" for host in job.hosts)
        if kind is _Kind.HYDRA:
            words += ["-hosts", hosts] if several else []
            words += ["-wdir", "/"]
        else:
            words += ["--host", hosts] if several else ["--oversubscribe"]
            words += ["--map-by", "slot", "--bind-to", "none", "--wdir", "/"]
            for name in sorted(self.environment(job)):
                if name.startswith(_PASSED_ON):
                    words += ["-x", name]
        return [*words, sys.executable, *rank_arguments(job, self.name, attempt)]

    def environment(self, job: Job) -> dict[str, str]:
        """See `Transport.environment`."""
        result = super().environment(job)
        if job.devices.ids is not None:
            result["CUDA_VISIBLE_DEVICES"] = ",".join(job.devices.ids)
        if os.geteuid() == 0:  # Open MPI asks root twice whether it is meant
            result |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return result

    def prepare(self, job: Job) -> None:
        """See `Transport.prepare`."""
        if job.hostfile is not None and not is_this_machine(job.hosts):
            check_hosts(job, job.hosts)


def _program() -> str:
    """Path of mpirun: that of this shell, else that of this environment. Raises UsageError where there is none."""
    folders = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    program = shutil.which("mpirun", path=folders)
    if program is None:
        raise UsageError("--launcher mpirun: there is no mpirun (pip install mpich, or Debian: apt-get install mpich)")
    return os.path.abspath(program)


def _kind(program: str) -> _Kind:
    """Which mpirun a program is. Raises UsageError where it is another one, or does not run."""
    try:
        done = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_VERSION_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{program} --version: {error}") from None
    text = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    if "Open MPI" in text or "OpenRTE" in text:
        return _Kind.OPEN_MPI
    if "hydra" in text.lower() or "Intel(R) MPI" in text:
        return _Kind.HYDRA
    raise UsageError(f"{program}: is neither MPICH's nor Open MPI's mpirun; put one of them first in PATH")
