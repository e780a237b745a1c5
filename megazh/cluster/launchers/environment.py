"""The environment of ranks that are started on this machine."""

import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence

from megazh.errors import UsageError

# Variables of other launchers about this process; a rank that read them would use a wrong rank number.
_FOREIGN_PREFIXES = ("PMI_", "PMIX_", "OMPI_", "TORCHELASTIC_")
_FOREIGN = {
    "SLURM_GTIDS",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_NPROCS",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_TASKS_PER_NODE",
    "SLURM_TASK_PID",
}
_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def environment_of_ranks(
    env: Mapping[str, str], ranks: int, gpu_ids: Sequence[int | str] | None, port: int
) -> dict[str, str]:
    """The environment that all ranks share: this process's, without variables of other launchers.

    Args:
        env: variables to add.
        ranks: number of ranks.
        gpu_ids: CUDA devices of the ranks; None: CPU.
        port: port of rank 0.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    }
    cores = len(os.sched_getaffinity(0))
    result = {
        "OMP_NUM_THREADS": str(
            max(1, cores // ranks)
        ),  # by default each rank would use all cores, and they would compete
        "PYTHONUNBUFFERED": "1",  # by default a killed rank loses its last output
        "PYTHONFAULTHANDLER": "1",
        **kept,
        **env,
        "PYTHONIOENCODING": "utf-8",  # of files and pipes that this process reads; the terminal may have another
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpu_ids or ())),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that GPUs are numbered as nvidia-smi does
        "DS_ACCELERATOR": "cpu" if gpu_ids is None else "cuda",
    }
    # Scripts of this environment, found by name.
    result["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), result.get("PATH", os.defpath)])
    if sys.flags.safe_path:
        result["PYTHONSAFEPATH"] = "1"
    return result


def refuse_copies() -> None:
    """Raise UsageError where srun or mpirun started this process several times."""
    for name in _SIZES:
        if os.environ.get(name, "1") != "1":
            raise UsageError(
                f"{name}={os.environ[name]}: started several times at once; start this command once (srun -n 1, "
                "sbatch --ntasks=1, no mpirun): it starts the ranks itself"
            )
