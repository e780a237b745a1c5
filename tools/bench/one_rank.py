"""A run of one rank in this process, on made-up documents, for tools that look at its steps from inside."""

import argparse
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from train_data import make_mixture

from megazh.cli.options import count, standalone
from megazh.run.folder import RunFolder
from megazh.run.requests import Inbox
from megazh.training.layout import make_layout
from megazh.training.recipe import Recipe, load_recipe
from megazh.training.recipe_files import recipe_path

if TYPE_CHECKING:
    from megazh.training.loop import Trainer


def parser(
    purpose: str, examples: str, call: Callable[[argparse.Namespace], None], micro_batches: int
) -> argparse.ArgumentParser:
    """The options that such tools share; `call` is what they call, `micro_batches` the default of a step."""
    found = standalone(purpose, examples)
    add = found.add_argument
    add("--recipe", default="qwen0.5b_6x3090_dp", metavar="NAME", help="model and settings (default: %(default)s)")
    add("--micro-batch-size", type=count, default=16, metavar="N", help="rows per micro-batch (default: 16)")
    add(
        "--micro-batches",
        type=count,
        default=micro_batches,
        metavar="N",
        help="micro-batches per step (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to this file")
    add("--set", dest="settings", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    found.set_defaults(call=call)
    return found


def recipe_of(arguments: argparse.Namespace, folder: Path, steps: int, device: str, *settings: str) -> Recipe:
    """The recipe of the options with `settings`, for `steps` steps of one rank on the data of `make_trainer`."""
    return load_recipe(
        recipe_path(arguments.recipe),
        [
            f"micro_batch_size={arguments.micro_batch_size}", f"steps={steps}", "pipe_parallel_size=1",
            f"global_batch_size={arguments.micro_batch_size * arguments.micro_batches}", *settings,
            *arguments.settings, f"data.manifest={folder / 'mixture.yaml'}", "stories=null",
            "gradient_accumulation_steps=null", "num_gpus=1", f"device={device}",
        ],
    )  # fmt: skip


def make_trainer(recipe: Recipe, folder: Path, document_tokens: float) -> "Trainer":
    """Write the data and the run folder, join a process group of this process alone, and make the trainer.

    Args:
        recipe: the recipe, see `recipe_of`.
        folder: existing folder for data and run.
        document_tokens: mean length of a document.
    """
    make_mixture(
        folder, (recipe.course.steps + 2) * recipe.course.tokens(0), recipe.model.vocab_size, document_tokens, 0
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    device = recipe.parallel.device.value
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["DS_ACCELERATOR"] = device
    from megazh.training.control import Control
    from megazh.training.loop import Trainer
    from megazh.training.worker import join

    run = RunFolder(folder / "run")
    run.begin(recipe.to_yaml(), recipe.open_mixture())
    Inbox.clear(run)  # it listens to commands, as other runs do
    return Trainer(run, recipe, make_layout(recipe, 1), join(device), Control())
