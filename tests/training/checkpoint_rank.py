"""One rank of a small pipeline that saves and loads checkpoints; see `test_checkpoint.py`.

`python checkpoint_rank.py FOLDER JOB ARGUMENT...`; every rank is a pipeline stage.
"""

import itertools
import os
import resource
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from decoders import packed
from pipeline.ladder_rank import CASES, Case, feed, make_pipeline, stage_weights
from pipeline.stage_rank import through_stages
from ranks import join_ranks, save_results

from megazh.errors import MegazhError, WriteError

TRAINED = {
    "tied": CASES["tied"],
    "untied": CASES["untied"],
    "bf16": CASES["tied bf16"],
}
ROW = [7, 6]
"""Lengths of the documents in the row whose logits are compared."""


def trained(case: Case, steps: int) -> tuple[Any, Any]:
    """Module and engine of a case after `steps` steps."""
    module, engine = make_pipeline(case, dist.get_world_size())
    for step in range(steps):
        engine.train_batch(feed(step, 0, 1))
    return module, engine


def save_to(engine: Any, folder: Path, step: int) -> Path:
    """Save a checkpoint of `step` steps; returns its path."""
    from megazh.training.checkpoint import save_checkpoint

    ranks = dist.get_world_size()
    bounds = [0, 4] if ranks == 1 else [0, 2, 4]
    return save_checkpoint(engine, folder, step, 8 * step, 128 * step, bounds, "fp32")


def save(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Save each case of `TRAINED` after two steps; returns size and logits then, and the weights one step later."""
    from megazh.training.checkpoint import state_bytes

    found = {}
    for name, case in TRAINED.items():
        module, engine = trained(case, 2)
        save_to(engine, folder / name, 2)
        size = state_bytes(engine)
        module.eval()
        tokens, _, positions, bounds = packed([ROW], sum(ROW) + 1)
        with torch.no_grad():
            logits = through_stages(module, tokens, positions, bounds)
        engine.train_batch(feed(2, 0, 1))
        found[name] = {"bytes": size, "logits": logits, "later": stage_weights(module)}
    return found


def load(folder: Path, checkpoints: list[str]) -> dict[str, Any]:
    """Load each checkpoint into a new engine of the case that its folder is named after.

    Returns for each checkpoint the error, or the weights one step later and the optimizer settings after loading,
    besides those that the run set. A checkpoint that only one rank refuses must not be among them: the other ranks
    would wait for that one.
    """
    from megazh.training.checkpoint import load_checkpoint
    from megazh.training.checkpoint_list import read_manifest

    found: dict[str, Any] = {}
    for path in map(Path, checkpoints):
        module, engine = make_pipeline(TRAINED[path.parent.name], dist.get_world_size())
        optimizer = engine.optimizer
        clip, decays = optimizer.clip_grad, [group["weight_decay"] for group in optimizer.param_groups]
        optimizer.clip_grad = clip + 1
        for group in optimizer.param_groups:
            group["weight_decay"] += 0.5
        try:
            load_checkpoint(engine, path, read_manifest(path))
        except MegazhError as error:
            found[str(path)] = {"error": str(error)}
            continue
        settings = [optimizer.clip_grad - 1, *(group["weight_decay"] - 0.5 for group in optimizer.param_groups)]
        optimizer.clip_grad = clip
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        engine.train_batch(feed(2, 0, 1))
        found[str(path)] = {"later": stage_weights(module), "settings": settings, "own_settings": [clip, *decays]}
    return found


def load_one(folder: Path, checkpoints: list[str]) -> dict[str, Any]:
    """Load a checkpoint of the case "tied"; errors are raised."""
    from megazh.training.checkpoint import load_checkpoint
    from megazh.training.checkpoint_list import read_manifest

    _, engine = make_pipeline(TRAINED["tied"], dist.get_world_size())
    load_checkpoint(engine, Path(checkpoints[0]), read_manifest(Path(checkpoints[0])))
    return {}


def save_for_ever(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Save step after step, until the process is killed."""
    _, engine = trained(CASES["tied"], 1)
    for step in itertools.count(int(arguments[0])):
        save_to(engine, folder / "tied", step)
    return {}


def fill_the_disk(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Save once; try to with too little room, and with a GPU that fails; and again after limiting the last rank to
    10,000 bytes per file."""
    from megazh import writing

    _, engine = trained(CASES["tied"], 1)
    save_to(engine, folder / "tied", 1)
    with mock.patch.object(writing, "free_bytes", return_value=1000):
        try:
            save_to(engine, folder / "tied", 2)
        except WriteError as error:
            print(f"too little room: {error}", file=sys.stderr, flush=True)
    with mock.patch.object(torch, "save", side_effect=RuntimeError("CUDA error: unspecified launch failure")):
        try:
            save_to(engine, folder / "tied", 2)
        except RuntimeError as error:
            print(f"passed on: {error!r}", file=sys.stderr, flush=True)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    save_to(engine, folder / "tied", 2)
    return {}


JOBS = {
    "save": save,
    "load": load,
    "load_one": load_one,
    "save_for_ever": save_for_ever,
    "fill_the_disk": fill_the_disk,
}

if __name__ == "__main__":
    join_ranks()
    try:
        results = JOBS[sys.argv[2]](Path(sys.argv[1]), sys.argv[3:])
    except MegazhError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    save_results(Path(sys.argv[1]), results)
    dist.barrier()
    dist.destroy_process_group()
