"""One rank of a run, as `megazh rank` runs it; the launcher starts one for each GPU."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from megazh.errors import INTERRUPTED, MegazhError, UsageError, WorkerError
from megazh.pipeline.operators import use_no_compiled_operators
from megazh.training.startup import Startup
from megazh.training.stop import StopRequest


def work(run: Path, stages: int, kind: str) -> int:
    """Train what the run folder says; returns the exit code (see `megazh.errors`).

    Args:
        run: the run folder.
        stages: of the pipeline.
        kind: `cpu` or `cuda`.
    """
    stop, startup = StopRequest(), Startup()
    # Where the launcher is DeepSpeed's, nobody else has set these; both are read when CUDA and DeepSpeed are imported.
    os.environ.setdefault("DS_ACCELERATOR", kind)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    from megazh.training.loop import Interrupted, train  # imports DeepSpeed, which looks for its accelerator

    startup.done("imports")
    try:
        device = join(kind)
        startup.done("joining the ranks")
        with _ended_group():
            train(run, stages, device, stop, startup)
    except MegazhError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Interrupted:
        return INTERRUPTED
    except torch.OutOfMemoryError as error:
        first = ". ".join(str(error).split(". ")[:2])
        print(
            f"error: rank {os.environ.get('RANK')}: {first}; set a smaller micro_batch_size, or "
            "activation_checkpointing=true ('megazh plan' shows what fits)",
            file=sys.stderr,
            flush=True,
        )
        return WorkerError.exit_code
    except OSError as error:
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr, flush=True)
        return WorkerError.exit_code
    return 0


def leave(code: int) -> NoReturn:
    """End this rank's process without the interpreter's own end.

    In about one of forty runs on a CPU, one of torch's threads aborted there ("terminate called without an active
    exception"), when all was done and written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def join(kind: str) -> torch.device:
    """Choose this rank's device and join the others."""
    # DeepSpeed broadcasts a flag inside of a backward pass, and synchronises without naming its device: both harmless.
    warnings.filterwarnings("ignore", message=".*an autograd kernel was not registered")
    warnings.filterwarnings("ignore", message=".*barrier\\(\\): using the device")
    # DeepSpeed calls what torch has renamed.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed")
    import deepspeed

    from megazh.pipeline.engine import quiet
    from megazh.pipeline.precision import WRITTEN_AGAINST, check_deepspeed_version

    check_deepspeed_version(deepspeed.__version__)
    if deepspeed.__version__ != WRITTEN_AGAINST and os.environ["RANK"] == "0":
        print(
            f"warning: DeepSpeed {deepspeed.__version__}: bf16 runs replace inner parts of {WRITTEN_AGAINST}; "
            "install that, or see first that tests/pipeline passes",
            file=sys.stderr,
            flush=True,
        )
    use_no_compiled_operators()
    local_rank = int(os.environ["LOCAL_RANK"])
    if kind == "cpu":
        device = torch.device("cpu")
    else:
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"rank {os.environ['RANK']}: no GPU {local_rank}; there are {torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    with quiet():
        deepspeed.init_distributed(dist_backend="gloo" if kind == "cpu" else "nccl", auto_mpi_discovery=False)
    return device


@contextlib.contextmanager
def _ended_group() -> Iterator[None]:
    """Leave the process group at the end of a run that went well; after a failure the launcher ends all ranks."""
    yield
    dist.destroy_process_group()
