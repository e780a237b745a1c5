"""Attention within documents for models of transformers: the project's own, registered under a name.

A model of transformers passes the keyword `attend` through to its attention. Without it the function raises: there is
no mask that could silently be missing, and no default that would let tokens see other documents or the future.
"""

from typing import Any

import torch
from transformers import AttentionInterface

from megazh.model.attention import Attend

NAME = "megazh_documents"
"""Name of the attention in `attn_implementation`. transformers makes no mask for names that it does not know."""


def attend_within_documents(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    attend: Attend | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of one block, as transformers calls it.

    Args:
        module: the block's attention, whose `layer_idx` is its number.
        query: (batch, heads, seq, head_dim), rotated.
        key: (batch, kv_heads, seq, head_dim), rotated.
        value: (batch, kv_heads, seq, head_dim).
        attention_mask: None.
        attend: attention of the micro-batch (see `megazh.model.attention`), or of a cache during generation.
        unused: what transformers passes besides; its scale is the usual one.

    Returns:
        (batch, seq, heads, head_dim), and no weights.

    Raises:
        ValueError: there is no `attend`, or a mask beside it.
    """
    if attend is None or attention_mask is not None:
        raise ValueError(f"attention {NAME} takes document boundaries by the keyword attend, and no attention_mask")
    # Under autocast, the rotation gives fp32 where the products gave bf16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    number: Any = module.layer_idx
    return attend(number, *(states.transpose(1, 2) for states in (query, key, value))), None


def register() -> None:
    """Make the attention known to transformers."""
    AttentionInterface.register(NAME, attend_within_documents)
