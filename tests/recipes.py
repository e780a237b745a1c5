"""A small recipe for tests; keys to change are given by their last names, such as `seq_len`."""

from typing import Any

from megazh.config import from_mapping
from megazh.settings import resolve_key
from megazh.training.recipe import Recipe

MODEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 8,
}

TINY_RUN: dict[str, Any] = {
    "model": {
        "vocab_size": 448,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "residual_dropout": 0.1,
    },
    "seq_len": 16,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "learning_rate": 1e-3,
    "warmup": 4,
    "validate_every": 0,
    "validation_samples": 2,
    "sample_prompts": [],
    "dtype": "fp32",
}
"""A run whose steps take milliseconds, for tests that start it again and again; without data (the fixture `stories`)
and number of steps."""


def in_sections(values: dict[str, Any]) -> dict[str, Any]:
    """Put flat keys, such as `steps`, into their sections; sections that are given as mappings are kept."""
    sections: dict[str, Any] = {}
    for name, value in values.items():
        if name in Recipe.model_fields and isinstance(value, dict):
            sections.setdefault(name, {}).update(value)
            continue
        section, _, key = resolve_key(name, Recipe).partition(".")
        sections.setdefault(section, {})[key] = value
    return sections


def make_recipe(**changes: Any) -> Recipe:
    """A recipe of 8 samples of 16 tokens per step, 2 per micro-batch; `model` is merged, other keys are replaced."""
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
    return from_mapping(in_sections(values), Recipe, "recipe")
