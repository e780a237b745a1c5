"""A run on its way from the command line to its ranks: the request, the case to check, the job to launch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from megazh.corpus.options import TextDocuments
from megazh.pipeline.precision import Precision
from megazh.run.folder import RunFolder
from megazh.settings import Settings
from megazh.training.layout import Layout, make_layout
from megazh.training.recipe import Device, Recipe


class Task(StrEnum):
    """What a run does to a model, which decides the recipe that is taken where none is given."""

    PRETRAIN = "pretrain"
    """Train on text."""
    NORMAL = "normal"
    """Fine-tune on conversations."""
    LONG_CONTEXT = "long_context"
    """Fine-tune on conversations at a longer context."""


class Host(NamedTuple):
    """A machine and the number of ranks that it takes, one per GPU."""

    name: str
    slots: int


class Launcher(StrEnum):
    """What starts the ranks of a run."""

    AUTO = "auto"
    """DeepSpeed's launcher for several hosts of a hostfile, srun in a Slurm job that has a task for each rank or
    several nodes, else the command itself."""
    LOCAL = "local"
    """The command itself: all ranks are on this machine."""
    SRUN = "srun"
    """One step of the Slurm job that the command runs in."""
    DEEPSPEED = "deepspeed"
    """DeepSpeed's launcher, through pdsh and ssh."""
    MPIRUN = "mpirun"
    """mpirun of MPICH or Open MPI."""


@dataclass(frozen=True)
class Request:
    """What the command line requests; see `megazh pretrain --help` and `megazh finetune --help`."""

    engine: str = "ds_pp"
    task: Task = Task.PRETRAIN
    recipe: str | None = None
    gpus: str | None = None
    """GPU ids such as `1,2,3` or `0-5`."""
    num_gpus: int | None = None
    stages: int | None = None
    hostfile: Path | None = None
    launcher: Launcher = Launcher.AUTO
    run: Path | None = None
    inputs: list[str] | None = None
    """The user's own text, in place of the recipe's data."""
    text_key: str = "text"
    text_documents: TextDocuments | None = None
    encoding: str | None = None
    """Encoding of the text, as `megazh.corpus.encodings.normal_encoding` gives it; None for UTF-8."""
    device: str | None = None
    allow_relayout: bool = False
    """Whether another layout is taken where the requested one does not fit the number of GPUs."""
    dry_run: bool = False
    settings: list[str] = field(default_factory=list)
    """`key=value` settings on top of the recipe."""


@dataclass(frozen=True)
class Devices:
    """The devices that a run computes on."""

    device: Device
    """CPU or CUDA."""
    ranks: int
    """Number of ranks, one per GPU."""
    ids: tuple[str, ...] | None
    """CUDA_VISIBLE_DEVICES of the ranks: numbers as nvidia-smi counts them, or UUIDs; None on the CPU."""
    note: str = ""
    """A line to print where the choice may surprise; else empty."""
    memory: int | None = None
    """Bytes of memory of the smallest of the GPUs; None where it is not known, and on the CPU."""


@dataclass(frozen=True)
class Case:
    """A run that is to be checked. It may be one that cannot work."""

    request: Request
    recipe: Recipe
    settings: Settings
    """The recipe's values with the places where they were written."""
    run: RunFolder
    data_folder: Path
    """Folder in which data is prepared where it has to be made first."""
    devices: Devices
    planned: bool = False
    """Whether the run is only planned, so that its data may be missing and its GPUs are others than those here."""

    @cached_property
    def job(self) -> Job:
        """The job, laid out. Raises UsageError where the layout cannot work."""
        return make_job(self.request, self.recipe, self.run.path, self.data_folder, self.devices)


@dataclass(frozen=True)
class Job:
    """A run that passed its checks: what a launcher starts."""

    run: RunFolder
    recipe: Recipe
    """The recipe, with the layout that is about to run in its section `parallel`."""
    layout: Layout
    devices: Devices
    data_folder: Path
    """Folder in which data is prepared where it has to be made first."""
    engine: str = "ds_pp"
    """Engine of the ranks, as `megazh pretrain -t` names it."""
    hostfile: Path | None = None
    """File with the hosts of the ranks; None where there is none."""
    launcher: Launcher = Launcher.LOCAL
    """What starts the ranks; never `AUTO`."""
    hosts: tuple[Host, ...] = ()
    """Hosts of the ranks; empty: this machine."""
    ranks_of_slots: tuple[int, ...] = ()
    """Rank of each slot; slots are numbered host by host, and slot 0 has rank 0."""
    notes: tuple[str, ...] = ()
    """Lines to print before the start."""

    @property
    def device(self) -> Device:
        """Device type of the run."""
        return self.devices.device

    @property
    def precision(self) -> Precision:
        """The dtypes of the run."""
        return self.recipe.precision.on(self.device)

    @property
    def arguments(self) -> list[str]:
        """The arguments of `megazh` in each rank."""
        return ["rank", str(self.run.path.resolve())]

    @property
    def labels(self) -> list[str]:
        """Names of the ranks in messages, such as `rank 1 (stage 1)`."""
        return [f"rank {rank} (stage {rank // self.layout.replicas})" for rank in range(self.layout.ranks)]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that each rank needs besides those of its launcher."""
        python_path = str(Path(__file__).resolve().parents[2])
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, (python_path, os.environ.get("PYTHONPATH")))),
            # torch warns that NCCL guesses a rank's device, although each rank has set its own.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        }


def make_job(request: Request, recipe: Recipe, run: Path, data_folder: Path, devices: Devices) -> Job:
    """Lay out a recipe on these devices.

    Raises:
        UsageError: the layout cannot work.
    """
    stages, note = _stages(request, devices, recipe)
    layout = make_layout(recipe, devices.ranks, stages)
    parallel = recipe.parallel.model_copy(
        update={"num_gpus": layout.ranks, "pipe_parallel_size": layout.stages, "device": devices.device}
    )
    notes = tuple(line for line in (note, devices.note) if line)
    recipe = with_dtypes(recipe.model_copy(update={"parallel": parallel}), devices.device)
    slots = tuple(range(layout.ranks))
    return Job(RunFolder(run), recipe, layout, devices, data_folder, request.engine, notes=notes, ranks_of_slots=slots)


def with_dtypes(recipe: Recipe, device: Device) -> Recipe:
    """The recipe with the dtypes that it has on a device written out."""
    dtypes = recipe.precision.on(device)
    update = {
        "dtype": dtypes.compute, "grad_accum_dtype": dtypes.accumulation, "communication_dtype": dtypes.communication,
    }  # fmt: skip
    return recipe.model_copy(update={"precision": recipe.precision.model_copy(update=update)})


def _stages(request: Request, devices: Devices, recipe: Recipe) -> tuple[int, str]:
    """Number of pipeline stages: the request's, else the recipe's.

    If none of -g, -n and -H was given and the GPUs do not divide by the recipe's stages, it is 1, with a note.
    """
    if request.stages is not None:
        return request.stages, ""
    wanted = recipe.parallel.pipe_parallel_size
    chosen = request.gpus is not None or request.num_gpus is not None or request.hostfile is not None
    if not chosen and devices.ranks % wanted:
        unit = "GPU" if devices.ranks == 1 else "GPUs"
        return 1, f"{devices.ranks} {unit} here, and the recipe has {wanted} pipeline stages: using one"
    return wanted, ""
