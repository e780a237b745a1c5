#!/usr/bin/env python3
"""Profile a training step, kernel by kernel, on one GPU.

    python tools/bench/profile_step.py

Engine and loop are those of a run; the documents are made up, as in `train.py`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    import torch
    from one_rank import make_trainer, parser, recipe_of

    from megazh.cli import run
    from megazh.cli.options import count
    from megazh.errors import UsageError
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'bash jobs/setup.sh' once, then use .venv/bin/python (or activate .venv)")

EXAMPLES = """examples:
  python tools/bench/profile_step.py
  python tools/bench/profile_step.py --set kernels=torch --json before.json
  python tools/bench/profile_step.py --seq-len 8192 --micro-batch-size 2 --document-tokens 20000

Times are those of one step by the profiler's clock on the GPU; "nothing runs" is the rest of the wall-clock time."""
WARM_UP = 3

GROUPS = (
    ("attention, forward", ("_attention_forward", "flash_fwd", "fmha_cutlassF", "flash_fprop")),
    ("attention, backward", ("_attention_backward", "flash_bwd", "fmha_cutlassB", "flash_bprop")),
    ("norm", ("_norm_forward", "_norm_backward", "rms_norm", "layer_norm", "vectorized_layer")),
    ("rotation", ("_rotate",)),
    ("SwiGLU", ("_swiglu_forward", "_swiglu_backward", "silu")),
    ("cross entropy", ("_cross_entropy",)),
    ("embedding", ("_embedding_gradient", "embedding", "indexSelect", "sort", "Sort")),
    ("products", ("gemm", "cutlass", "nvjet", "xmma", "splitK", "gemv")),
    ("optimizer", ("multi_tensor_apply", "FusedAdam", "fused_adam", "adam")),
    ("communication", ("nccl",)),
    ("copies", ("Memcpy", "memcpy", "Memset", "memset", "copy", "Copy")),
)  # fmt: skip
"""Group of a kernel by a part of its name; the first match counts."""


def group_of(kernel: str) -> str:
    """The row that a kernel belongs to."""
    return next((group for group, names in GROUPS if any(name in kernel for name in names)), "elementwise and others")


def call(arguments: argparse.Namespace) -> None:
    """Train a few steps, and profile one."""
    if not torch.cuda.is_available():
        raise UsageError("torch sees no GPU, and this tool measures nothing else; run it on a machine with one")
    with tempfile.TemporaryDirectory(prefix="megazh-profile-") as name:
        profile(arguments, Path(name))


def profile(arguments: argparse.Namespace, folder: Path) -> None:
    """Train and profile in this process, as the only rank."""
    from megazh.run.metrics import Metrics

    recipe = recipe_of(arguments, folder, WARM_UP + 1, "cuda", f"seq_len={arguments.seq_len}")
    trainer = make_trainer(recipe, folder, arguments.document_tokens)
    with Metrics(folder / "run", 0, quiet=True) as trainer.metrics:
        for _ in range(WARM_UP):
            trainer.take_step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            begun = time.perf_counter()
            trainer.take_step()
            torch.cuda.synchronize()
            wall = (time.perf_counter() - begun) * 1e3
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name].append(event.time_range.elapsed_us() / 1e3)
    report(arguments, kernels, wall, recipe.course.tokens(0))
    torch.distributed.destroy_process_group()


def report(arguments: argparse.Namespace, kernels: dict[str, list[float]], wall: float, tokens: int) -> None:
    """Print the time of each group, then of the kernels that take most."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, times in kernels.items():
        groups[group_of(name)] += times
    print(
        f"{arguments.recipe} {' '.join(arguments.settings)}: one step of {tokens:,} tokens, {arguments.micro_batches} "
        f"micro-batches, {torch.cuda.get_device_name()}: {wall:.1f} ms"
    )
    rows = [(name, len(times), sum(times)) for name, times in groups.items()]
    rows.append(("nothing runs", 0, max(0.0, wall - sum(total for _, _, total in rows))))
    for name, calls, total in sorted(rows, key=lambda row: -row[2]):
        print(f"{name:<26} {calls:>7} {total:>9.2f} ms {total / wall:>7.1%}")
    print(f"the {arguments.kernels} kernels that take most:")
    most = sorted(kernels.items(), key=lambda item: -sum(item[1]))[: arguments.kernels]
    for name, times in most:
        print(f"{sum(times):>9.2f} ms {len(times):>6} x {sum(times) / len(times) * 1e3:>9.1f} us  {name[:110]}")
    if arguments.json:
        found = {"wall_ms": wall, "tokens": tokens, "groups": rows, "kernels": {k: [len(v), sum(v)] for k, v in most}}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def options() -> argparse.ArgumentParser:
    """The command line."""
    found = parser("profile a training step, kernel by kernel, on one GPU", EXAMPLES, call, micro_batches=4)
    add = found.add_argument
    add("--seq-len", type=count, default=1024, metavar="N", help="tokens per row (default: 1024)")
    add("--document-tokens", type=float, default=500.0, metavar="N", help="mean length of a document (default: 500)")
    add("--kernels", type=count, default=25, metavar="N", help="number of kernels to list (default: 25)")
    return found


if __name__ == "__main__":
    sys.exit(run(options().parse_args()))
