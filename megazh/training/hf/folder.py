"""The files beside the weights that make a checkpoint a folder from which transformers loads the model."""

import json
from pathlib import Path

from megazh.exchange.families import choose_family
from megazh.exchange.generation_config import GENERATION, generation_config
from megazh.exchange.hf_config import CONFIG, hf_config
from megazh.files import write_atomic
from megazh.tokenizer import Tokenizer
from megazh.training.recipe import Recipe


def write_folder(folder: Path, recipe: Recipe, tokenizer: Tokenizer, dtype: str, chat_end: str | None = None) -> None:
    """Write `config.json` and `generation_config.json`. `megazh export` writes the tokenizer as well.

    Args:
        folder: the folder, which holds the weights.
        recipe: the recipe.
        tokenizer: the run's tokenizer.
        dtype: torch's name of the weights' dtype, such as `bfloat16`.
        chat_end: see `generation_config`.

    Raises:
        WriteError: a file cannot be written.
    """
    generation = generation_config(tokenizer, chat_end)
    eos, pad = generation["eos_token_id"], generation["pad_token_id"]
    values = hf_config(recipe.model, choose_family(recipe.model), recipe.batch.seq_len, dtype, eos, pad)
    write_atomic(folder / CONFIG, (json.dumps(values, indent=2) + "\n").encode())
    write_atomic(folder / GENERATION, (json.dumps(generation, indent=2) + "\n").encode())
