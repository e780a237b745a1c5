"""Shifted sparse attention (S2-Attn of LongLoRA, arXiv 2309.12307, section 3.2): attention within groups of tokens.

The first half of the heads attends within groups of `group` tokens, the second half within groups that are shifted by
half a group, so that what groups know flows from one to the next over the blocks. Two things differ from the authors'
code without flash attention, which rolls the row: nothing wraps around, so that the first and the last half group of
the second half of the heads stand alone and no token sees the future; and a group never crosses a document. Groups are
counted from the start of each document, so that a packed document computes what it computes alone, and a document of
at most `group` tokens has full attention.
"""

import torch


def group_bounds(
    index: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the group of each token, for either half of the heads.

    Args:
        index: (batch, seq) int32, index of each token in its row.
        starts: (batch, seq) int32, index of the first token of each token's document.
        ends: (batch, seq) int32, index one past the last token of each token's document.
        group: tokens per group, an even number.

    Returns:
        Index of the first token of each token's group, and index one past its last token: (2, batch, seq) int32 each.
        Neither decreases along a row.
    """
    length, place = ends - starts, index - starts
    whole = length <= group
    first, last = [], []
    for shift in (0, group // 2):
        begin = (place + shift).div(group, rounding_mode="floor") * group - shift
        end = torch.minimum(begin + group, length)
        first.append(starts + begin.clamp(min=0).masked_fill(whole, 0))
        last.append(starts + torch.where(whole, length, end))
    return torch.stack(first), torch.stack(last)
