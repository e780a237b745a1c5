"""One rank of a run, as `megazh rank` runs it; a launcher starts one per GPU."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megazh import __version__
from megazh.console import LAST_WORDS, finish_console, lenient, mark
from megazh.errors import MegazhError, UsageError, WorkerError
from megazh.program import program, runnable
from megazh.progress import duration
from megazh.run.folder import RunFolder
from megazh.run.pulse import beat, open_pulse
from megazh.training.control import Control, Interrupted, Reason
from megazh.training.hang import start_limit, watch_alone, write_stacks_to
from megazh.training.layout import make_layout
from megazh.training.recipe import Recipe, run_recipe
from megazh.training.startup import Startup

if TYPE_CHECKING:
    import torch


def work(run: Path) -> int:
    """Train the run in the folder `run`, whose config.yaml says how; returns the exit code (see `megazh.errors`).

    RUN/logs/rank_N.log gets lines about begin and end of this rank, and its error. Nothing is raised.
    """
    notes, begun = _Notes(RunFolder(run).logs), time.monotonic()
    watched = open_pulse()

    def end(code: int) -> int:
        notes.add(f"ended with exit code {code} after {duration(time.monotonic() - begun)}")
        return code

    def leave_at_once(reason: Reason) -> None:
        notes.add(f"stopped before the first step: {reason.text}")
        beat("stopped", reason=reason)
        leave(end(reason.exit_code))

    def give_up(what: str) -> None:
        leave(end(notes.fail(f"error: rank {os.environ.get('RANK')}: {what}", WorkerError.exit_code)))

    control, startup = Control(leave_at_once), Startup()
    write_stacks_to(notes.path)
    try:
        return end(_train(run, control, startup, notes, lambda limit: None if watched else watch_alone(limit, give_up)))
    except BaseException:  # a bug, or a library that gave up
        return end(notes.fail(traceback.format_exc().rstrip()))


def _train(run: Path, control: Control, startup: Startup, notes: _Notes, watch: Callable[[float], None]) -> int:
    notes.add(f"process {os.getpid()} on {os.uname().nodename}: {_versions()}")
    try:
        recipe, engine = run_recipe(RunFolder(run)), RunFolder(run).info().engine
        device_type, hang_seconds = recipe.parallel.device.value, recipe.control.hang_minutes * 60
        control.limit(recipe.control.max_hours, startup.begun)
        watch(hang_seconds)
        # DeepSpeed's launcher sets neither; both are read when CUDA and DeepSpeed are imported.
        os.environ.setdefault("DS_ACCELERATOR", device_type)
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        with _no_garbage_collection():
            import torch

            from megazh.training.binding import bind_to_gpu
            from megazh.training.loop import train  # imports DeepSpeed, which looks for its accelerator

            if engine == "hf":
                from megazh.training.hf.loop import train
    except MegazhError as error:
        return notes.fail(f"error: {runnable(str(error))}", error.exit_code)
    startup.done("imports")
    try:
        device = join(device_type, hang_seconds)
        startup.done("joining the ranks")
        if bound := bind_to_gpu(device):
            notes.add(bound)
        notes.add(_place(recipe, device))
        with _ended_group():
            train(run, device, control, startup)
    except MegazhError as error:
        return notes.fail(f"error: {runnable(str(error))}", error.exit_code)
    except Interrupted as stopped:
        notes.add(f"stopped: {stopped.reason.text}")
        return stopped.reason.exit_code
    except torch.OutOfMemoryError as error:
        first = ". ".join(str(error).split(". ")[:2])
        return notes.fail(
            f"error: rank {os.environ.get('RANK')}: {first}; set a smaller micro_batch_size, or "
            f"activation_checkpointing=true ('{program()} plan' shows what fits)",
            WorkerError.exit_code,
        )
    except OSError as error:
        what = f"{error.filename or 'input or output'}: {error.strerror or error}"
        return notes.fail(f"error: {what}", WorkerError.exit_code)
    return 0


class _Notes:
    """Lines about this rank in RUN/logs/rank_N.log. A disk that takes them no longer does not end the rank."""

    def __init__(self, logs: Path) -> None:
        self._rank = os.environ.get("RANK", "0")
        self.path = logs / f"rank_{self._rank}.log"

    def add(self, text: str) -> None:
        """Add a line with the time."""
        self._append(mark(f"rank {self._rank}: {text}"))

    def fail(self, text: str, code: int = 1) -> int:
        """Give the reason to end: to stderr, to the log, and to the launcher; returns the exit code `code`."""
        line = f"{text}\n"
        stderr = lenient(sys.stderr)
        stderr.write(line)
        stderr.flush()
        if not self._is_stderr():
            self._append(line)
        with contextlib.suppress(KeyError, ValueError, OSError):
            os.write(int(os.environ[LAST_WORDS]), line.encode("utf-8", "replace")[-(1 << 15) :])
        return code

    def _append(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(line.encode("utf-8", "replace"))

    def _is_stderr(self) -> bool:
        try:
            return os.path.samestat(os.fstat(2), self.path.stat())
        except OSError:
            return False


def _versions() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    return f"megazh {__version__}, {libraries}, Python {platform.python_version()}"


def _place(recipe: Recipe, device: torch.device) -> str:
    """Stage, replica and device of this rank."""
    import torch

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    layout = make_layout(recipe, ranks)
    stage, replica = divmod(rank, layout.replicas)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        name = f"{device}: {card.name}, {card.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    else:
        name = f"{device}, {torch.get_num_threads()} threads"
    return f"stage {stage} of {layout.stages}, replica {replica} of {layout.replicas}; {name}"


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Import without garbage collection, and exempt what was imported from later ones.

    torch and DeepSpeed make some million objects that stay. To look at all of them takes a quarter of a second, and
    DeepSpeed and torch collect garbage several times during start-up.
    """
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def leave(code: int) -> NoReturn:
    """End this rank's process without the interpreter's own shutdown.

    In about one of forty runs on a CPU, one of torch's threads aborted during that shutdown ("terminate called without
    an active exception"), after everything was done and written. With NCCL it can hang.
    """
    finish_console(code)
    os._exit(code)


def join(device_type: str, hang_seconds: float = 0.0) -> torch.device:
    """Choose this rank's device, `cpu` or `cuda`, and join the process group of all ranks.

    Args:
        device_type: `cpu` or `cuda`.
        hang_seconds: seconds without progress that are a hang; 0: nothing is one.
    """
    # DeepSpeed broadcasts a flag inside a backward pass, and calls barrier() without naming its device: both harmless.
    warnings.filterwarnings("ignore", message=".*an autograd kernel was not registered")
    warnings.filterwarnings("ignore", message=".*barrier\\(\\): using the device")
    # DeepSpeed calls functions that torch has renamed.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed")
    import deepspeed
    import torch

    from megazh.pipeline.engine import quiet, use_no_compiled_operators
    from megazh.pipeline.precision import WRITTEN_AGAINST, check_deepspeed_version

    check_deepspeed_version(deepspeed.__version__)
    if deepspeed.__version__ != WRITTEN_AGAINST and os.environ["RANK"] == "0":
        print(
            f"warning: DeepSpeed {deepspeed.__version__}: bf16 runs replace internals of {WRITTEN_AGAINST}; install "
            "that version, or check first that tests/pipeline passes",
            file=sys.stderr,
            flush=True,
        )
    use_no_compiled_operators()
    local_rank = int(os.environ["LOCAL_RANK"])
    if device_type == "cpu":
        device = torch.device("cpu")
    else:
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"rank {os.environ['RANK']}: no GPU {local_rank}; there are {torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    with quiet():
        deepspeed.init_distributed(
            dist_backend="gloo" if device_type == "cpu" else "nccl",
            auto_mpi_discovery=False,
            timeout=start_limit(hang_seconds),
        )
    return device


@contextlib.contextmanager
def _ended_group() -> Iterator[None]:
    """Leave the process group after a successful run; after a failure the launcher ends all ranks."""
    yield
    import torch.distributed as dist

    dist.destroy_process_group()
