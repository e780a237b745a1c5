"""Choose what starts the ranks of a run, and where: this command, srun, DeepSpeed's launcher, mpirun."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megazh.cluster.gpus import choose_devices, parse_gpu_list
from megazh.cluster.hostfile import is_this_machine
from megazh.cluster.launchers import local, remote
from megazh.cluster.launchers.deepspeed import DeepSpeed
from megazh.cluster.launchers.mpirun import MpiRun
from megazh.cluster.launchers.srun import Srun, check_place
from megazh.cluster.launchers.transport import Transport
from megazh.cluster.slurm.job import SlurmJob, slurm_job
from megazh.errors import UsageError
from megazh.training.job import Case, Devices, Host, Job, Launcher
from megazh.training.recipe import Device

_TRANSPORTS: dict[Launcher, type[Transport]] = {
    Launcher.SRUN: Srun,
    Launcher.DEEPSPEED: DeepSpeed,
    Launcher.MPIRUN: MpiRun,
}


@dataclass(frozen=True)
class Place:
    """Where a run is to be."""

    launcher: Launcher
    """What starts its ranks; never `AUTO`."""
    hosts: tuple[Host, ...]
    """Its hosts; empty: this machine."""
    devices: Devices


def choose_place(case: Case, hosts: Sequence[Host]) -> Place:
    """Choose launcher, hosts and devices of a run.

    Args:
        case: the run.
        hosts: the hosts of its hostfile; empty without one.

    Raises:
        UsageError: the requested launcher, hosts or devices cannot work.
    """
    wanted, elsewhere = case.request.launcher, bool(hosts) and not is_this_machine(hosts)
    if wanted is Launcher.DEEPSPEED and not hosts:
        raise UsageError("--launcher deepspeed: needs the hosts; name a hostfile with -H")
    if wanted is Launcher.DEEPSPEED or (wanted is Launcher.AUTO and elsewhere):
        return _on_hosts(case, hosts, Launcher.DEEPSPEED)
    if wanted is Launcher.MPIRUN:
        return _by_mpirun(case, hosts)
    if elsewhere:
        raise UsageError(
            f"--launcher {wanted.value} and -H {case.request.hostfile}, which names other hosts: leave one out"
        )
    if wanted is Launcher.SRUN:
        return _in_slurm(case, check_place(slurm_job()))
    if wanted is Launcher.AUTO and not hosts and (job := slurm_job()) is not None and not job.in_step:
        if len(job.nodes) > 1:
            return _in_slurm(case, job)
        devices = _devices_here(case, hosts)
        # A task for each rank was asked for: then srun binds each to its cores.
        if case.request.gpus is None and devices.ranks == job.tasks > 1:
            return _in_slurm(case, job)
        return Place(Launcher.LOCAL, (), devices)
    return Place(Launcher.LOCAL, (), _devices_here(case, hosts))


def hosts_for(place: Place, ranks: int) -> tuple[Host, ...]:
    """The hosts of a place, of which a run takes `ranks` slots: with srun as many of each, else the first ones.

    Raises:
        UsageError: srun cannot start so many.
    """
    hosts = place.hosts
    if ranks == sum(host.slots for host in hosts) or not hosts:
        return hosts
    if place.launcher is not Launcher.SRUN:
        before = [sum(host.slots for host in hosts[:number]) for number in range(len(hosts))]
        taken = [Host(host.name, min(host.slots, ranks - first)) for host, first in zip(hosts, before, strict=True)]
        return tuple(host for host in taken if host.slots > 0)
    if ranks % len(hosts):
        raise UsageError(
            f"{ranks} ranks on {len(hosts)} nodes: srun needs as many on each; submit the job with fewer nodes "
            "(-N), or give another global_batch_size"
        )
    return tuple(Host(host.name, ranks // len(hosts)) for host in hosts)


def launch(job: Job) -> int:
    """Run the ranks of a job until all have ended; returns the exit code."""
    return local.launch(job) if job.launcher is Launcher.LOCAL else remote.launch(job, _TRANSPORTS[job.launcher]())


def launch_command(job: Job) -> list[str]:
    """Words that describe the launch of a job, for a dry run. Raises UsageError where it cannot work."""
    return local.command(job) if job.launcher is Launcher.LOCAL else _TRANSPORTS[job.launcher]().command(job, "ID")


def _in_slurm(case: Case, job: SlurmJob) -> Place:
    """All of a Slurm job: a rank per GPU, or per task on the CPU."""
    request, recipe = case.request, case.recipe
    if request.gpus is not None:
        raise UsageError(
            f"-g {request.gpus}: with srun, ranks take all GPUs of the Slurm job; leave -g out, or give --launcher "
            "local"
        )
    wanted = None if recipe.parallel.device is Device.AUTO else recipe.parallel.device.value
    device, note, memory = Device.CUDA, "", None
    if not any(node.gpus for node in job.nodes) or socket.gethostname().partition(".")[0] == job.nodes[0].name:
        # Otherwise this is a login node, whose GPUs, if any, say nothing about the job's.
        here = choose_devices(
            request.device or wanted, None, None, None, cpu_may_stand_in=recipe.precision.dtype == "auto"
        )
        device, note, memory = here.device, here.note, here.memory
    elif (request.device or wanted) == "cpu":
        device = Device.CPU
    hosts = tuple(Host(node.name, node.gpus if device is Device.CUDA else node.tasks) for node in job.nodes)
    if len({host.slots for host in hosts}) > 1 or not hosts[0].slots:
        what = "GPUs" if device is Device.CUDA else "tasks"
        counts = ", ".join(f"{host.name} {host.slots}" for host in hosts)
        remedy = "--gres=gpu:N" if device is Device.CUDA else "--ntasks-per-node=N"
        raise UsageError(f"srun needs as many {what} on each node, and this job has {counts}: submit it with {remedy}")
    ranks = sum(host.slots for host in hosts)
    if request.num_gpus not in (None, ranks):
        raise UsageError(
            f"-n {request.num_gpus}: this Slurm job has {ranks} {'GPUs' if device is Device.CUDA else 'tasks'} on "
            f"{len(hosts)} nodes, and srun starts a rank for each; leave -n out, or submit the job with as many"
        )
    return Place(Launcher.SRUN, hosts, Devices(device, ranks, None, note, memory))


def _devices_here(case: Case, hosts: Sequence[Host]) -> Devices:
    request, recipe = case.request, case.recipe
    count = request.num_gpus or (hosts[0].slots if hosts and request.gpus is None else None)
    taken = len(parse_gpu_list(request.gpus)) if request.gpus else count
    if hosts and taken and taken > hosts[0].slots:
        option = f"-g {request.gpus}" if request.gpus else f"-n {request.num_gpus}"
        raise UsageError(
            f"{option}: {taken} GPUs, and {hosts[0].name} has slots={hosts[0].slots} in -H {request.hostfile}; "
            "take fewer, or raise slots there"
        )
    wanted = recipe.parallel.device
    device = request.device or (None if wanted is Device.AUTO else wanted.value)
    return choose_devices(
        device,
        request.gpus,
        count,
        recipe.parallel.num_gpus,
        cpu_may_stand_in=recipe.precision.dtype == "auto",
        fewer_will_do=request.allow_relayout,
        elsewhere=request.dry_run,
    )


def _by_mpirun(case: Case, hosts: Sequence[Host]) -> Place:
    """The hosts of a hostfile, else all of a Slurm job, else this machine."""
    if hosts and not is_this_machine(hosts):
        return _on_hosts(case, hosts, Launcher.MPIRUN)
    if not hosts and (job := slurm_job()) is not None and not job.in_step:
        return replace(_in_slurm(case, job), launcher=Launcher.MPIRUN)
    devices = _devices_here(case, hosts)
    return Place(Launcher.MPIRUN, (Host("localhost", devices.ranks),), devices)


def _on_hosts(case: Case, hosts: Sequence[Host], launcher: Launcher) -> Place:
    """All slots of the hosts of a hostfile, or those that -g chooses on each."""
    request = case.request
    slots = parse_gpu_list(request.gpus) if request.gpus else None
    for host in hosts:
        missing = [slot for slot in map(str, slots or ()) if not slot.isdecimal() or int(slot) >= host.slots]
        if missing:
            raise UsageError(
                f"-g {','.join(missing)}: host {host.name} has slots 0 to {host.slots - 1} (-H {request.hostfile})"
            )
    taken = tuple(Host(host.name, len(slots)) for host in hosts) if slots is not None else tuple(hosts)
    ranks = sum(host.slots for host in taken)
    if request.num_gpus not in (None, ranks):
        raise UsageError(
            f"-n {request.num_gpus}, but the hosts of -H {request.hostfile} give {ranks} GPUs; leave -n out"
        )
    ids = None if slots is None else tuple(map(str, slots))
    return Place(launcher, taken, Devices(Device.CPU if request.device == "cpu" else Device.CUDA, ranks, ids))
