"""A small recipe for tests."""

from typing import Any

from megazh.config import from_mapping
from megazh.training.recipe import Recipe

MODEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 8,
}


def make_recipe(**changes: Any) -> Recipe:
    """A recipe of 8 samples of 16 tokens a step, two at a time; `model` is merged, the rest replaced."""
    values = {
        "data": {"manifest": "m.yaml"},
        "seq_len": 16,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "learning_rate": 1e-3,
        "steps": 10,
        **changes,
        "model": {**MODEL, **changes.get("model", {})},
    }
    return from_mapping(values, Recipe, "recipe")
