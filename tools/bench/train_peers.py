"""The trainers that `train.py` compares megazh with; each is a function that takes one optimizer step on given batches.

Each is set up for speed on one GPU as its own documentation describes, in bf16, without recomputation unless its note
says otherwise. The note also names the part of megazh's work that it leaves out.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megazh.index.loader import Batch
from megazh.model.config import ModelConfig

Step = Callable[[Iterator[Batch], int], float]
"""Trains on a number of micro-batches and takes one step; returns the loss of the last micro-batch."""


@dataclass(frozen=True)
class Peer:
    """A trainer to compare with."""

    make: Callable[[ModelConfig, int, torch.device], Step]
    """Makes its step from the model's shape, the tokens per row and the device."""
    packages: tuple[str, ...]
    """Packages that it needs."""
    note: str
    """Differences from megazh's work, for the table."""


def _qwen(config: ModelConfig, seq_len: int, attention: str) -> Any:
    """Make transformers' Qwen2 of this shape (the architecture of Qwen1.5)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = Qwen2Config(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.kv_heads,
        intermediate_size=config.intermediate_size, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_word_embeddings, max_position_embeddings=seq_len, use_cache=False,
        attn_implementation=attention,
    )  # fmt: skip
    settings.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
    return Qwen2ForCausalLM(settings)


def _trainer(compiled: bool, config: ModelConfig, seq_len: int, device: torch.device) -> Step:
    """transformers' Trainer: fp32 weights under autocast; its own training step, clipping and fused AdamW."""
    import tempfile

    from transformers import Trainer, TrainingArguments

    model = _qwen(config, seq_len, "sdpa")
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="megazh-bench-"), bf16=True, optim="adamw_torch_fused", learning_rate=5e-4,
        max_grad_norm=1.0, torch_compile=compiled, report_to=[], save_strategy="no", disable_tqdm=True, max_steps=1000,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments)
    trainer.create_optimizer()
    wrapped, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    wrapped.train()

    def step(batches: Iterator[Batch], micro_batches: int) -> float:
        trainer.current_gradient_accumulation_steps = micro_batches
        for _ in range(micro_batches):
            batch = next(batches)
            # The Trainer shifts labels itself.
            tokens = batch["tokens"].long()
            loss = trainer.training_step(wrapped, {"input_ids": tokens, "labels": tokens})
        trainer.accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss) * micro_batches

    return step


def _seed_method(config: ModelConfig, seq_len: int, device: torch.device) -> Step:
    """An earlier script for six 3090s: dense document mask, eager attention, all layers recomputed, bf16 weights."""
    model = _qwen(config, seq_len, "eager").to(device, torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, fused=True)

    def micro_batch(batch: Batch) -> torch.Tensor:
        rows, length = batch["tokens"].shape
        places = torch.arange(length, device=device, dtype=torch.int32)
        document = torch.searchsorted(batch["cu_seqlens"][:, 1:].contiguous(), places.expand(rows, -1), right=True)
        seen = (document[:, :, None] == document[:, None, :]) & (places[:, None] >= places[None, :])
        mask = torch.zeros(rows, 1, length, length, device=device, dtype=torch.bfloat16)
        mask.masked_fill_(~seen[:, None], torch.finfo(torch.bfloat16).min)
        logits = model(
            input_ids=batch["tokens"].long(), attention_mask=mask, position_ids=batch["position_ids"].long()
        ).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten().long(), ignore_index=-100)

    return functools.partial(_plain_step, model, optimizer, micro_batch)


def _litgpt(config: ModelConfig, seq_len: int, device: torch.device) -> Step:
    """litgpt's GPT, compiled as in `litgpt pretrain`, chunked cross entropy, bf16 weights and optimizer state."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    settings = Config(
        name="bench", block_size=seq_len, vocab_size=config.vocab_size, padded_vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers, n_head=config.num_attention_heads, n_query_groups=config.kv_heads,
        n_embd=config.hidden_size, rotary_percentage=1.0, parallel_residual=False, bias=False,
        attn_bias=config.qkv_bias, norm_class_name="RMSNorm", norm_eps=config.norm_eps, mlp_class_name="LLaMAMLP",
        intermediate_size=config.intermediate_size, rope_base=int(config.rope_theta),
    )  # fmt: skip
    with device:
        model = GPT(settings).to(torch.bfloat16)
    if config.tie_word_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    model.max_seq_length = seq_len
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, fused=True)

    def micro_batch(batch: Batch) -> torch.Tensor:
        return chunked_cross_entropy(compiled(batch["tokens"].long()), batch["labels"].long())

    return functools.partial(_plain_step, model, optimizer, micro_batch)


def _megatron(config: ModelConfig, seq_len: int, device: torch.device) -> Step:
    """megatron-core's GPTModel with the local layer spec, without Transformer Engine."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    _join_alone()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    settings = TransformerConfig(
        num_layers=config.num_hidden_layers, hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads, num_query_groups=config.kv_heads,
        ffn_hidden_size=config.intermediate_size, normalization="RMSNorm", layernorm_epsilon=config.norm_eps,
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, add_qkv_bias=config.qkv_bias,
        hidden_dropout=0.0, attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16, bias_activation_fusion=False, masked_softmax_fusion=False,
        apply_rope_fusion=False, persist_layer_norm=False, attention_softmax_in_fp32=False,
    )  # fmt: skip
    model = GPTModel(
        settings, get_gpt_layer_local_spec(normalization="RMSNorm"), config.vocab_size, seq_len,
        share_embeddings_and_output_weights=config.tie_word_embeddings, position_embedding_type="rope",
        rotary_base=int(config.rope_theta), parallel_output=False,
    ).to(device, torch.bfloat16)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, fused=True)

    def micro_batch(batch: Batch) -> torch.Tensor:
        rows, length = batch["tokens"].shape
        places = torch.arange(length, device=device, dtype=torch.int32)
        document = torch.searchsorted(batch["cu_seqlens"][:, 1:].contiguous(), places.expand(rows, -1), right=True)
        hidden = (document[:, :, None] != document[:, None, :]) | (places[:, None] < places[None, :])
        losses = model(
            batch["tokens"].long(), batch["position_ids"].long(), hidden[:, None], labels=batch["tokens"].long()
        )
        return losses.float().mean()

    return functools.partial(_plain_step, model, optimizer, micro_batch)


def _join_alone() -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("nccl", store=store, rank=0, world_size=1)


def _plain_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batch: Callable[[Batch], torch.Tensor],
    batches: Iterator[Batch],
    micro_batches: int,
) -> float:
    """Accumulate gradients, clip, and take an optimizer step."""
    for _ in range(micro_batches):
        loss = micro_batch(next(batches)) / micro_batches
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()) * micro_batches


PEERS = {
    "litgpt": Peer(_litgpt, ("litgpt", "lightning"), "compiled; no document mask; bf16 weights and optimizer state"),
    "hf-compiled": Peer(
        functools.partial(_trainer, True), ("transformers", "accelerate"), "Trainer, torch_compile; no document mask"
    ),
    "hf": Peer(functools.partial(_trainer, False), ("transformers", "accelerate"), "Trainer, SDPA; no document mask"),
    "megatron": Peer(
        _megatron, ("megatron.core",), "GPTModel, local spec; dense document mask; bf16 weights and optimizer state"
    ),
    "seed": Peer(
        _seed_method, ("transformers",),
        "an earlier script for six 3090s: dense document mask, eager, recomputes all; bf16 weights and optimizer state",
    ),
}  # fmt: skip
"""Peers by name, the fastest first."""
