"""One rank of a run to which things happen that must not spoil it; see `test_health.py`.

`python health_rank.py FOLDER MANIFEST STAGES DTYPE`.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from ranks import join_ranks, save_results
from recipes import make_recipe

from megazh import writing
from megazh.errors import MegazhError
from megazh.run.folder import RunFolder
from megazh.run.metrics import Metrics
from megazh.training.checkpoint_list import list_checkpoints
from megazh.training.collect import of_rank_0
from megazh.training.control import Control, Interrupted, Reason
from megazh.training.layout import make_layout
from megazh.training.recipe import Recipe

Z_LOSS = 1e-2


def recipe_on(manifest: str, stages: int, dtype: str) -> Recipe:
    """A small recipe that samples two prompts."""
    return make_recipe(
        model={"vocab_size": 512},
        data={"manifest": manifest},
        seq_len=64,
        dtype=dtype,
        steps=6,
        validation_samples=40,
        sample_prompts=["从前", "小狗"],
        sample_tokens=20,
        num_gpus=2,
        pipe_parallel_size=stages,
        validate_every=1,
        z_loss=Z_LOSS,
    )


def error_of(call: Callable[[], object]) -> str:
    """The class and the message of what `call` raises; empty if it raises nothing."""

    try:
        call()
    except (MegazhError, Interrupted) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def poisoned(tensor: torch.Tensor, value: float, rank: int, call: Callable[[], object]) -> str:
    """The error of `call` while one number of `tensor` is `value` on this rank."""
    with torch.no_grad():
        flat = tensor.view(-1)
        kept = flat[5].clone()
        if dist.get_rank() == rank:
            flat[5] = value
        found = error_of(call)
        flat[5] = kept
    return found


def run(folder: Path, recipe: Recipe, stages: int) -> dict[str, Any]:
    """What happens, as errors and names of checkpoints."""
    from megazh.training.loop import Trainer
    from megazh.training.verdicts import end_if_diverged

    run_folder, control = RunFolder(folder / "run"), Control()
    if dist.get_rank() == 0:
        run_folder.begin(recipe.to_yaml(), recipe.open_mixture())
    dist.barrier()

    def trainer() -> Any:
        return Trainer(run_folder, recipe, make_layout(recipe, 2, stages), torch.device("cpu"), control)

    def saved() -> list[str]:
        return [path.name for path in list_checkpoints(run_folder.checkpoints)]

    own, results = trainer(), dict[str, Any]()
    pieces = own.engine.optimizer.pieces_to_load()
    with Metrics(run_folder.path, 0, quiet=dist.get_rank() != 0) as own.metrics:
        for _ in range(2):
            own.take_step()
        weight = next(own.engine.module.parameters())
        results["weight"] = poisoned(weight.data, math.nan, 1, own.checkpoints.save)
        results["infinite"] = poisoned(weight.data, math.inf, 0, own.checkpoints.save)
        for kind in ("master", "exp_avg_sq"):
            values = next((piece.values for piece in pieces if piece.kind == kind), None)
            if values is not None:
                results[kind] = poisoned(values, math.nan, 1, own.checkpoints.save)
        dist.barrier()
        results["saved while poisoned"] = saved()
        # A norm and a loss that are not finite, the norm on one rank only: no bit changes.
        kept_pieces = [piece.values.clone() for piece in pieces]

        def unchanged() -> bool:
            return all(torch.equal(piece.values, kept) for piece, kept in zip(pieces, kept_pieces, strict=True))

        results["changed nothing"] = {}
        plain = own.state.totals
        own.state.totals = lambda *parts: replace(plain(*parts), norm=math.nan if dist.get_rank() == 1 else 1.0)
        own.engine.train_batch(own._feed)
        results["changed nothing"]["NORM_NOT_FINITE"] = unchanged()
        own.state.totals = lambda *parts: replace(plain(*parts), loss=math.nan)
        own.take_step()
        results["changed nothing"][own.guard.verdict.name] = unchanged()
        own.state.totals = plain
        end_if_diverged(own)
        results["skipped by a loss"] = own.guard.skipped_in_row
        # Logits that are not finite.
        norm = own.engine.module._norm
        kept = None if norm is None else norm.weight.data.clone()
        if norm is not None:
            norm.weight.data.fill_(math.nan)
        own.evaluations.done = set()
        results["samples of NaN"] = error_of(own.evaluations.sample)
        results["validation of NaN"] = error_of(own.evaluations.validate)
        if norm is not None:
            norm.weight.data.copy_(kept)
        # Only one rank knows of the request to stop.
        own.evaluations.done = set()
        if dist.get_rank() == 1:
            own.control.request(Reason.TERMINATED)
        results["stop in validation"] = error_of(own.evaluate)
        own.evaluations.done, own.checkpoints.saver.saved_at = {"validation"}, own.step
        results["stop in a sample"] = error_of(own.evaluations.sample)
        own.control = Control()
        results["saved by a stop"] = saved()
        results["evaluated"] = of_rank_0(sorted(own.metrics.evaluated_at(3)))
        # A checkpoint for which there is no room.
        with mock.patch.object(writing, "free_bytes", return_value=1000):
            own.checkpoints.save(wait=False)
        # A checkpoint that an earlier version saved with weights that are not finite.
        own.take_step()
        results["taken"] = own.guard.verdict.name
        with torch.no_grad():
            weight.view(-1)[5] = math.nan
        import megazh.training.checkpoints as checkpoints

        look, checkpoints.find_not_finite = checkpoints.find_not_finite, lambda optimizer, device: None
        flushed: list[list[str]] = []
        with mock.patch.object(own.metrics, "flush", side_effect=lambda: flushed.append(saved())):
            own.checkpoints.save()
        results["there when records were flushed"] = of_rank_0(flushed)
        checkpoints.find_not_finite = look
    results["resume"] = error_of(trainer)
    return results


if __name__ == "__main__":
    join_ranks()
    manifest, stages, dtype = sys.argv[2], int(sys.argv[3]), sys.argv[4]
    save_results(Path(sys.argv[1]), run(Path(sys.argv[1]), recipe_on(manifest, stages, dtype), stages))
    dist.barrier()
    dist.destroy_process_group()
