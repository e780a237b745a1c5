"""One rank that trains, and notes the state of Python's garbage collector; see `test_garbage.py`.

`python garbage_rank.py FOLDER MANIFEST`.
"""

import contextlib
import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import join_ranks, save_results
from recipes import make_recipe

from megazh.run.folder import RunFolder
from megazh.training.control import Control, Interrupted, Reason
from megazh.training.layout import make_layout


def train(folder: Path, manifest: str) -> dict[str, Any]:
    """Whether objects are frozen and collection is automatic, before each step; and the steps with collections."""
    from megazh.training.loop import Trainer

    recipe = make_recipe(
        model={"vocab_size": 512}, data={"manifest": manifest}, seq_len=64, steps=5, validate_every=3, sample_every=0,
        checkpoint_every=0, dtype="fp32", num_gpus=1,
    )  # fmt: skip
    run = RunFolder(folder / "run")
    run.begin(recipe.to_yaml(), recipe.open_mixture())
    gc.unfreeze()
    trainer = Trainer(run, recipe, make_layout(recipe, 1), torch.device("cpu"), Control())
    before_steps: list[tuple[bool, bool]] = []
    collected_after: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2 and not gc.isenabled():
            collected_after.append(trainer.step)

    take_step = trainer.take_step

    def noting_step() -> Any:
        before_steps.append((gc.get_freeze_count() > 10_000, gc.isenabled()))
        if len(before_steps) == 5:
            raise Interrupted(Reason.PERSON)
        return take_step()

    trainer.take_step = noting_step  # type: ignore[method-assign]
    gc.callbacks.append(note)
    with contextlib.suppress(Interrupted):
        trainer.run()
    return {"before steps": before_steps, "collected after": collected_after}


if __name__ == "__main__":
    join_ranks()
    save_results(Path(sys.argv[1]), train(Path(sys.argv[1]), sys.argv[2]))
    dist.destroy_process_group()
