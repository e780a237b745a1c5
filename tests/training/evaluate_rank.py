"""One rank that validates and samples; see `test_evaluate.py`.

`python evaluate_rank.py FOLDER MANIFEST STAGES`.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pipeline.ladder_rank import SEED
from ranks import join_ranks, save_results
from recipes import make_recipe

from megazh.model.backend import Backend
from megazh.training.layout import make_layout
from megazh.training.prompting import Prompting
from megazh.training.recipe import Recipe

LIMITS = [None, 7]
"""Largest numbers of validation samples: no limit, and a number that leaves a micro-batch incomplete."""
PROMPT, TOKENS = "从前，小兔子", 12


def recipe_on(manifest: str) -> Recipe:
    """A recipe with large weights, so that samples depend on the model; dropout and groups must be off here."""
    model = {"vocab_size": 512, "initializer_range": 0.2, "residual_dropout": 0.3}
    return make_recipe(model=model, data={"manifest": manifest}, seq_len=64, dtype="fp32", pattern="s2", group_tokens=8)


def evaluate(recipe: Recipe, stages: int) -> dict[str, Any]:
    """Losses and bits per byte by limit, together and by corpus, each computed twice, and continuations by seed."""
    from megazh.pipeline.engine import make_engine, quiet
    from megazh.pipeline.module import DecoderPipeline
    from megazh.pipeline.precision import Dtype, Precision
    from megazh.tokenizer import load_tokenizer
    from megazh.training.evaluate import sample_text, validate
    from megazh.training.held_out import HeldOut
    from megazh.training.optimizers.choose import rules
    from megazh.training.stages import work_of

    layout = make_layout(recipe, dist.get_world_size(), stages)
    work = work_of(recipe, layout, Precision(Dtype.FP32, Dtype.FP32, Dtype.FP32), Backend.MASKED)
    bounds = [0, 2, 4] if stages == 2 else [0, 4]
    with quiet():
        module = DecoderPipeline(work, bounds, SEED, z_loss=0.5)
    engine = make_engine(module, recipe.optimizer.name.value, rules(recipe.optimizer), work, 1.0)
    mixture = recipe.open_mixture()
    tokenizer = load_tokenizer(Path(recipe.data.manifest).parent / "tokenizer.json")
    replica = module.mpu().get_data_parallel_rank()
    found: dict[str, Any] = {"validations": [], "texts": []}
    for limit in LIMITS:
        held_out = HeldOut(mixture.validation, layout, replica, limit, tokenizer)
        for _ in range(2):
            validation = validate(engine, held_out)
            assert validation is not None
            corpora = {name: dataclasses.asdict(each) for name, each in validation.corpora.items()}
            found["validations"].append((held_out.samples, validation.loss, validation.bits_per_byte, corpora))
    for seed in (1, 1, 2):
        module.train()
        found["texts"].append(sample_text(engine, Prompting(tokenizer), PROMPT, TOKENS, seed))
        assert module.training, "dropout is on again for training"
    return found


if __name__ == "__main__":
    join_ranks()
    save_results(Path(sys.argv[1]), evaluate(recipe_on(sys.argv[2]), int(sys.argv[3])))
    dist.barrier()
    dist.destroy_process_group()
