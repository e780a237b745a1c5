"""One rank of a run, as `megazh rank` runs it; a launcher starts one per GPU."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megazh.errors import INTERRUPTED, MegazhError, UsageError, WorkerError
from megazh.program import program, runnable
from megazh.run.folder import RunFolder
from megazh.training.recipe import run_recipe
from megazh.training.startup import Startup
from megazh.training.stop import StopRequest

if TYPE_CHECKING:
    import torch


def work(run: Path) -> int:
    """Train the run in the folder `run`, whose config.yaml says how; returns the exit code (see `megazh.errors`)."""
    stop, startup = StopRequest(), Startup()
    try:
        device_type = run_recipe(RunFolder(run)).parallel.device.value
        # DeepSpeed's launcher sets neither; both are read when CUDA and DeepSpeed are imported.
        os.environ.setdefault("DS_ACCELERATOR", device_type)
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        with _no_garbage_collection():
            import torch

            from megazh.training.loop import Interrupted, train  # imports DeepSpeed, which looks for its accelerator
    except MegazhError as error:
        print(f"error: {runnable(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    startup.done("imports")
    try:
        device = join(device_type)
        startup.done("joining the ranks")
        with _ended_group():
            train(run, device, stop, startup)
    except MegazhError as error:
        print(f"error: {runnable(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    except Interrupted:
        return INTERRUPTED
    except torch.OutOfMemoryError as error:
        first = ". ".join(str(error).split(". ")[:2])
        print(
            f"error: rank {os.environ.get('RANK')}: {first}; set a smaller micro_batch_size, or "
            f"activation_checkpointing=true ('{program()} plan' shows what fits)",
            file=sys.stderr,
            flush=True,
        )
        return WorkerError.exit_code
    except OSError as error:
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr, flush=True)
        return WorkerError.exit_code
    return 0


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
    an active exception"), after everything was done and written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def join(device_type: str) -> torch.device:
    """Choose this rank's device, `cpu` or `cuda`, and join the process group of all ranks."""
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
        deepspeed.init_distributed(dist_backend="gloo" if device_type == "cpu" else "nccl", auto_mpi_discovery=False)
    return device


@contextlib.contextmanager
def _ended_group() -> Iterator[None]:
    """Leave the process group after a successful run; after a failure the launcher ends all ranks."""
    yield
    import torch.distributed as dist

    dist.destroy_process_group()
