#!/usr/bin/env python3
"""Measure the training speed of megazh and of other trainers on the same GPU and the same packed tokens.

    python tools/bench/train.py

megazh runs with its own launcher, engine, loop and loader; `megazh_hf` is the same recipe with `-t hf`. The contenders
run one after the other, each in a process of its own with the GPU to itself; `train_peers.py` says what each of the
peers is and leaves out. Peers that are not installed
are named.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    import torch
    from train_data import batches, make_mixture, untrained
    from train_peers import PEERS
    from train_report import MEGAZH, MEGAZH_HF, Report, Result

    from megazh.cli import run
    from megazh.cli.options import count, standalone
    from megazh.cluster.launchers.local import run_ranks
    from megazh.errors import UsageError, WorkerError
    from megazh.pipeline.costs import LayerCosts
    from megazh.pipeline.timing import remembered_seconds
    from megazh.run.folder import RunFolder
    from megazh.training.checks.hf import PACKAGES
    from megazh.training.recipe import Recipe, load_recipe, run_recipe
    from megazh.training.recipe_files import recipe_path
    from megazh.training.startup import BEGUN, Startup
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'bash jobs/setup.sh' once, then use .venv/bin/python (or activate .venv)")

EXAMPLES = """examples:
  python tools/bench/train.py                                       0.5B, 1024 tokens, one GPU, all peers
  python tools/bench/train.py --contenders megazh litgpt --steps 20 --json bench.json
  python tools/bench/train.py --contenders megazh megazh_hf         both engines: -t ds_pp and -t hf
  python tools/bench/train.py --num-gpus 2 --stages 1 --stages 2 --contenders megazh
  python tools/bench/train.py --seq-len 8192 --micro-batch-size 2 --document-tokens 20000

A step is --micro-batches micro-batches and one update of the weights. tokens/s come from the median step after
the warm-up, over whole steps, loader and loop included. MFU = tokens/s x FLOPs per token / peak, with 6 FLOPs per
parameter in matrix products and 6 x width x tokens per layer for causal attention, over whole rows, documents or not,
and the dense bf16 peak of the card (megazh/run/peaks.py). Memory is the largest allocation."""


def measure_megazh(
    folder: Path, recipe: Recipe, stages: int, gpus: int, device: str, warm_up: int, engine: str = "ds_pp"
) -> Result:
    """Start ranks that train `recipe` as `megazh pretrain` does, without validation and checkpoints."""
    path = folder / f"run-{engine}-{stages}"
    RunFolder(path).begin(recipe.to_yaml(), recipe.open_mixture(), engine=engine)
    command = [str(Path(__file__).resolve()), "--rank", str(path), "--device", device]
    root = str(Path(__file__).resolve().parents[2])
    env = {BEGUN: str(time.time()), "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids: list[int | str] = list(seen.split(",")[:gpus]) if seen else list(range(gpus))
    code = run_ranks(command, gpus, env, ids if device == "cuda" else None, path / "logs")
    if code:
        raise WorkerError(f"megazh ended with exit code {code}; its output is above")
    found = json.loads((path / "result.json").read_text())
    name = MEGAZH if engine == "ds_pp" else MEGAZH_HF
    return Result(
        f"{name} pp={stages} dp={gpus // stages}" if gpus > 1 else name,
        found["seconds"][warm_up:],
        found["memory_bytes"],
        found["losses"],
        "documents masked; fp32 master weights, optimizer state and sums",
        sum(found["data_seconds"][warm_up:]) / sum(found["seconds"][warm_up:]),
        stages,
        found["bounds"],
        LayerCosts.model_validate(found["costs"]) if found["costs"] else None,
    )


def serve_megazh(path: Path, device_type: str) -> None:
    """One rank of `measure_megazh`."""
    startup = Startup()
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    import torch.distributed as dist

    from megazh.run.metrics import METRICS, Metrics
    from megazh.training.control import Control
    from megazh.training.layout import make_layout
    from megazh.training.loop import Trainer
    from megazh.training.worker import join, leave

    startup.done("imports")
    device = join(device_type)
    startup.done("joining the ranks")
    folder = RunFolder(path)
    recipe = untrained(run_recipe(folder))
    layout = make_layout(recipe, dist.get_world_size())
    if folder.info().engine == "hf":
        _serve_hf(folder, recipe, device, startup)
        dist.barrier()
        dist.destroy_process_group()
        leave(0)
    trainer = Trainer(folder, recipe, layout, device, Control(), startup)
    seconds = []
    with Metrics(path, 0, quiet=dist.get_rank() != 0) as trainer.metrics:
        for _ in range(recipe.course.steps):
            begun = time.perf_counter()
            trainer.take_step()
            seconds.append(time.perf_counter() - begun)
    memory: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(memory, torch.cuda.max_memory_allocated() if device_type == "cuda" else 0)
    if dist.get_rank() == 0:
        records = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
        found = {
            "seconds": seconds,
            "memory_bytes": max(memory),
            "losses": [record["loss"] for record in records],
            "data_seconds": [record["data_seconds"] for record in records],
            "bounds": trainer.bounds,
            "costs": _costs(trainer, device) if layout.stages > 1 else None,
        }
        (path / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


def _serve_hf(folder: RunFolder, recipe: Recipe, device: torch.device, startup: Startup) -> None:
    """One rank that trains with `-t hf`; its steps are timed by the run itself."""
    import torch.distributed as dist

    from megazh.run.metrics import METRICS
    from megazh.training.control import Control
    from megazh.training.hf.loop import HfRun
    from megazh.training.layout import make_layout

    HfRun(folder, recipe, make_layout(recipe, dist.get_world_size()), device, Control(), startup).run()
    if dist.get_rank() == 0:
        lines = (folder.path / METRICS).read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["kind"] == "step"]
        found = {
            "seconds": [record["step_seconds"] for record in records],
            "memory_bytes": records[-1]["memory_bytes"] or 0,
            "losses": [record["loss"] for record in records],
            "data_seconds": [record["data_seconds"] for record in records],
            "bounds": None,
            "costs": None,
        }
        (folder.path / "result.json").write_text(json.dumps(found))


def measure_peer(name: str, folder: Path, arguments: argparse.Namespace) -> Result:
    """Start a process that trains a peer."""
    result = folder / f"{name}.json"
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--serve",
        name,
        "--folder",
        str(folder),
        *_settings(arguments),
    ]
    log = folder / f"{name}.log"
    with open(log, "w") as errors:
        code = subprocess.run(command, stdout=errors, stderr=errors, timeout=arguments.timeout, check=False).returncode
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise WorkerError(f"ended with exit code {code}: {lines[-1] if lines else 'no message'}")
    found = json.loads(result.read_text())
    return Result(name, found["seconds"][arguments.warm_up :], found["memory_bytes"], found["losses"], PEERS[name].note)


def serve_peer(name: str, arguments: argparse.Namespace) -> None:
    """The process of `measure_peer`."""
    recipe = _recipe(arguments)
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    step = PEERS[name].make(recipe.model, recipe.batch.seq_len, device)
    samples = batches(arguments.folder / "mixture.yaml", recipe.batch.seq_len, recipe.batch.micro_batch_size, device)
    seconds, losses = [], []
    for _ in range(arguments.steps):
        begun = time.perf_counter()
        losses.append(step(samples, arguments.micro_batches))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    found = {"seconds": seconds, "memory_bytes": torch.cuda.max_memory_allocated(), "losses": losses}
    (arguments.folder / f"{name}.json").write_text(json.dumps(found))


def _settings(arguments: argparse.Namespace) -> list[str]:
    names = ("recipe", "seq_len", "micro_batch_size", "micro_batches", "steps")
    given = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    return [*given, "--set", *arguments.settings] if arguments.settings else given


def _recipe(arguments: argparse.Namespace, gpus: int = 1, extra: Sequence[str] = ()) -> Recipe:
    """The recipe's model and settings, with the benchmark's batch and length.

    The batch does not depend on the number of stages: every layout of the same GPUs trains the same samples per step.
    """
    batch = arguments.micro_batch_size * arguments.micro_batches * gpus
    settings = [
        f"seq_len={arguments.seq_len}",
        f"micro_batch_size={arguments.micro_batch_size}",
        f"global_batch_size={batch}",
        f"steps={arguments.steps}",
        "gradient_accumulation_steps=null",
        "warmup=0.1",
        f"num_gpus={gpus}",
        f"device={arguments.device}",
        *extra,
    ]
    return load_recipe(recipe_path(arguments.recipe), [*settings, *arguments.settings])


def _costs(trainer: Any, device: torch.device) -> dict[str, Any] | None:
    """Layer times that the start of this run, or an earlier one, has measured."""
    if device.type != "cuda":
        return None
    found = remembered_seconds(trainer.work, torch.cuda.get_device_name(device))
    return found.model_dump() if found else None


def call(arguments: argparse.Namespace) -> None:
    """Measure all contenders and print the table."""
    arguments.stages = arguments.stages or [1]
    if arguments.serve:
        serve_peer(arguments.serve, arguments)
        return
    if arguments.rank:
        serve_megazh(arguments.rank, arguments.device)
        return
    if arguments.device == "cuda" and torch.cuda.device_count() < arguments.num_gpus:
        raise UsageError(
            f"--num-gpus {arguments.num_gpus}, and torch sees {torch.cuda.device_count()}; on a CPU: --device cpu "
            "--recipe demo"
        )
    if arguments.warm_up >= arguments.steps:
        raise UsageError(f"--warm-up {arguments.warm_up} of --steps {arguments.steps}: no step is left to measure")
    recipe = _recipe(arguments)
    per_gpu = arguments.micro_batch_size * arguments.micro_batches * arguments.seq_len
    card = torch.cuda.get_device_name(0) if arguments.device == "cuda" else None
    # With stages, each step has as many tokens as with replicas alone: equal work on both sides.
    tokens = per_gpu * arguments.num_gpus
    report = Report(arguments, recipe, tokens, card)
    with tempfile.TemporaryDirectory(prefix="megazh-bench-") as name:
        folder = Path(name)
        amount = (arguments.steps + 2) * per_gpu * arguments.num_gpus
        manifest = make_mixture(folder, amount, recipe.model.vocab_size, arguments.document_tokens, arguments.seed)
        for contender in arguments.contenders:
            needed = PEERS[contender].packages if contender in PEERS else PACKAGES if contender == MEGAZH_HF else ()
            missing = [each for each in needed if not _installed(each)]
            try:
                if contender == MEGAZH:
                    for stages in arguments.stages:
                        extra = [f"data.manifest={manifest}", "stories=null", f"pipe_parallel_size={stages}"]
                        own = _recipe(arguments, arguments.num_gpus, extra)
                        report.add(
                            measure_megazh(folder, own, stages, arguments.num_gpus, arguments.device, arguments.warm_up)
                        )
                elif contender == MEGAZH_HF and not missing:
                    settings = (f"data.manifest={manifest}", "stories=null", "sample_prompts=[]")
                    own = _recipe(arguments, arguments.num_gpus, [*settings, "pipe_parallel_size=1"])
                    report.add(
                        measure_megazh(
                            folder, own, 1, arguments.num_gpus, arguments.device, arguments.warm_up, engine="hf"
                        )
                    )
                elif recipe.low_rank is not None:
                    report.leave_out(contender, "trains all weights, and the recipe has LoRA")
                elif missing:
                    report.leave_out(contender, f"not installed: pip install {' '.join(missing)}")
                elif arguments.num_gpus > 1 or arguments.device == "cpu":
                    report.leave_out(contender, "runs on one GPU only")
                else:
                    report.add(measure_peer(contender, folder, arguments))
            except (WorkerError, subprocess.TimeoutExpired) as error:
                report.leave_out(contender, str(error))
    report.print()


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = standalone("measure how fast megazh trains, beside other trainers", EXAMPLES)
    add = found.add_argument
    add(
        "--contenders",
        nargs="+",
        default=[MEGAZH, MEGAZH_HF, *PEERS],
        choices=[MEGAZH, MEGAZH_HF, *PEERS],
        metavar="NAME",
        help=", ".join([MEGAZH, MEGAZH_HF, *PEERS]),
    )
    add("--recipe", default="qwen0.5b_6x3090_dp", metavar="NAME", help="model and settings (default: %(default)s)")
    add("--seq-len", type=count, default=1024, metavar="N", help="tokens per row (default: 1024)")
    add("--micro-batch-size", type=count, default=16, metavar="N", help="rows per micro-batch (default: 16)")
    add("--micro-batches", type=count, default=8, metavar="N", help="micro-batches per GPU and step (default: 8)")
    add("--steps", type=count, default=12, metavar="N", help="steps, warm-up included (default: 12)")
    add("--warm-up", type=int, default=4, metavar="N", help="steps that are not counted (default: 4)")
    add("--document-tokens", type=float, default=500.0, metavar="N", help="mean length of a document (default: 500)")
    add("--num-gpus", type=count, default=1, metavar="N", help="megazh alone can use more than one (default: 1)")
    add("--stages", type=count, action="append", metavar="N", help="megazh's pipeline stages; may be given repeatedly")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    add("--seed", type=int, default=0, metavar="N", help="seed of the made-up documents")
    add("--timeout", type=count, default=600, metavar="N", help="time limit of a peer in seconds (default: 600)")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("--set", dest="settings", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    add("--serve", help=argparse.SUPPRESS)
    add("--rank", type=Path, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    found.set_defaults(call=call)
    return found


if __name__ == "__main__":
    sys.exit(run(parser().parse_args()))
