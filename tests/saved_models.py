"""Checkpoints of given models in any layout, without training, and folders of Hugging Face models."""

from pathlib import Path

import torch
from made_runs import unpadded
from pieces import BLOCK, MadeOptimizer, made_manifest, write_pieces

from megazh.model.decoder import Decoder
from megazh.model.lora_config import LoraConfig
from megazh.pipeline.state import MASTER, WEIGHT, Piece
from megazh.training.checkpoint_list import read_manifest
from megazh.training.saver import write_manifest


def save_model(
    folder: Path, model: Decoder, layout: tuple[int, int] = (1, 1), precision: str = "bf16", seq_len: int = 64
) -> Path:
    """Write a checkpoint of step 3, with random optimizer state; returns its path.

    Args:
        folder: the folder that it is made in.
        model: the model, in fp32.
        layout: stages and replicas.
        precision: `bf16`, for bf16 weights and fp32 masters, or `fp32`, for fp32 weights alone.
        seq_len: tokens per sample, as its recipe has them.
    """
    weights = {name: weight.float().reshape(-1) for name, weight in unpadded(model)}
    shapes = {name: tuple(weight.shape) for name, weight in unpadded(model)}
    recipe = {"model": model.config.model_dump(mode="json", exclude_none=True), "batch": {"seq_len": seq_len}}
    manifest = made_manifest(
        3, precision=precision, recipe=recipe, stages=layout[0], replicas=layout[1], bounds=[0, len(shapes)]
    )
    if precision == "fp32":
        pieces = [
            Piece(name, WEIGHT, shapes[name], 0, values.numel(), values.clone()) for name, values in weights.items()
        ]
        return write_pieces(folder, [pieces], manifest)
    state: dict[tuple[str, str], torch.Tensor] = {}
    for name, values in weights.items():
        state |= {(name, kind): torch.randn(values.numel()) for kind in ("exp_avg", "exp_avg_sq")}
        state |= {(name, WEIGHT): values.bfloat16(), (name, MASTER): values}
        state[name, "absmax"] = torch.randn(-(-values.numel() // BLOCK))
    stages, replicas = layout
    ranks = [
        MadeOptimizer(state, stage, stages, replica, replicas, shapes=shapes)
        for stage in range(stages)
        for replica in range(replicas)
    ]
    return write_pieces(folder, [rank.pieces_to_save() for rank in ranks], manifest)


def save_lora(
    folder: Path, model: Decoder, lora: LoraConfig, base: Path = Path("base"), precision: str = "fp32"
) -> Path:
    """Write a checkpoint as `save_model` does, of a LoRA run from `base`; returns its path."""
    path = save_model(folder, model, precision=precision)
    manifest = read_manifest(path)
    recipe = {"lora": lora.model_dump(mode="json"), "checkpoint": {"initial_checkpoint": str(base)}}
    write_manifest(path, manifest.model_copy(update={"recipe": {**manifest.recipe, **recipe}}))
    return path


def as_tensors(model: Decoder) -> dict[str, torch.Tensor]:
    """The weights of a model by the names that transformers has for them, cut by hand."""
    config, here = model.config, dict(unpadded(model))
    queries, keys = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    found = {"model.embed_tokens.weight": here["embedding.weight"], "model.norm.weight": here["norm.weight"]}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = here["head.weight"]
    for number in range(config.num_hidden_layers):
        there, block = f"model.layers.{number}", f"blocks.{number}"
        found[f"{there}.input_layernorm.weight"] = here[f"{block}.attention_norm.weight"]
        found[f"{there}.post_attention_layernorm.weight"] = here[f"{block}.mlp_norm.weight"]
        found[f"{there}.self_attn.o_proj.weight"] = here[f"{block}.attention.o_proj.weight"]
        found[f"{there}.mlp.down_proj.weight"] = here[f"{block}.mlp.down_proj.weight"]
        gate, up = here[f"{block}.mlp.up_proj.weight"].chunk(2)
        found |= {f"{there}.mlp.gate_proj.weight": gate, f"{there}.mlp.up_proj.weight": up}
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = here[f"{block}.attention.qkv_proj.{kind}"].split((queries, keys, keys))
            found |= {f"{there}.self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    return found
