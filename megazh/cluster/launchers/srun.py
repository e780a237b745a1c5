"""Launch the ranks of a job by one srun inside of a Slurm job: one task per rank, on one node or several, no ssh."""

import os
import shutil
import sys

from megazh.cluster.launchers.transport import Transport, rank_arguments
from megazh.cluster.slurm.job import SlurmJob, slurm_job
from megazh.errors import UsageError
from megazh.training.job import Job, Launcher

_BUSY_SECONDS = 60  # for an earlier step to end; without a limit srun would wait for ever

# Options of the job that srun would take for options of the step. Ranks see all GPUs of their node, and take their own
# by LOCAL_RANK: peers have to see each other's memory.
_NOT_OF_THE_STEP = {
    "SLURM_CPUS_PER_TASK",
    "SLURM_DISTRIBUTION",
    "SLURM_GPU_BIND",
    "SLURM_GPUS",
    "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_SOCKET",
    "SLURM_GPUS_PER_TASK",
    "SLURM_HOSTFILE",
    "SLURM_NPROCS",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_CORE",
    "SLURM_NTASKS_PER_GPU",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_NTASKS_PER_SOCKET",
    "SLURM_OPEN_MODE",
    "SLURM_THREADS_PER_CORE",
    "SLURM_TRES_BIND",
    "SLURM_TRES_PER_TASK",
}


class Srun(Transport):
    """srun."""

    name = Launcher.SRUN

    def command(self, job: Job, attempt: str) -> list[str]:
        if shutil.which("srun") is None:
            raise UsageError("--launcher srun: there is no srun here; load Slurm's module, or give --launcher local")
        slurm, per_node = slurm_job(), job.hosts[0].slots
        cores = min(node.cores for node in slurm.nodes) // per_node if slurm is not None else 0
        return [
            "srun",
            f"--nodes={len(job.hosts)}",
            f"--ntasks={job.layout.ranks}",
            f"--ntasks-per-node={per_node}",
            f"--cpus-per-task={max(1, cores)}",
            *([] if cores else ["--overcommit"]),  # fewer cores than ranks
            "--distribution=block",
            "--cpu-bind=none",  # ranks bind themselves to the cores beside their GPU (megazh/training/binding.py)
            "--kill-on-bad-exit=1",
            "--mpi=none",  # ranks meet through torch.distributed
            "--export=ALL",
            "--input=none",
            f"--immediate={_BUSY_SECONDS}",
            sys.executable,
            *rank_arguments(job, self.name, attempt),
        ]

    def environment(self, job: Job) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if name not in _NOT_OF_THE_STEP}
        return {**env, **job.environment}

    def fault(self, text: str) -> str:
        if "Requested nodes are busy" not in text:
            return ""
        return (
            f"srun: another step of this Slurm job still holds its nodes after {_BUSY_SECONDS} s: end it ('squeue -s' "
            "shows it), or wait for it, and run the same command again"
        )


def check_place(job: SlurmJob | None) -> SlurmJob:
    """The Slurm job, if a step can be made in it. Raises UsageError."""
    if job is None:
        raise UsageError(
            "--launcher srun: this is no Slurm job (no SLURM_JOB_ID): submit one (sbatch slurm/pretrain_6x3090.sh), or "
            "give --launcher local"
        )
    if job.in_step:
        raise UsageError(
            "--launcher srun: this command is itself in a step of srun, which holds the job's nodes: call it in the "
            "job's script without srun, or give --launcher local"
        )
    return job
