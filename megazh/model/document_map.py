"""The document map: position ids, document boundaries and sample numbers of a micro-batch in one small integer tensor.

Pipeline stages send it along with the hidden state. Each stage prepares its attention and its dropout from it; no mask
is ever sent. Its shape is the same in training and in validation, where sample numbers are -1.
"""

import torch


def encode_document_map(
    position_ids: torch.Tensor, cu_seqlens: torch.Tensor, sample_numbers: torch.Tensor | None = None
) -> torch.Tensor:
    """Join position ids, document boundaries and sample numbers of a micro-batch.

    Args:
        position_ids: (batch, seq) int32.
        cu_seqlens: (batch, segments + 1) int32, boundaries of the segments of each row, padded with seq.
        sample_numbers: (batch,) int64, number of each sample in the run, which its dropout depends on. Default: -1.

    Returns:
        (batch, seq + segments + 3) int32; the last two columns are the bytes of the sample numbers.
    """
    if sample_numbers is None:
        sample_numbers = torch.full((len(position_ids),), -1, device=position_ids.device)
    return torch.cat((position_ids, cu_seqlens, sample_numbers[:, None].view(torch.int32)), 1)


def decode_document_map(document_map: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Take position ids and document boundaries out of a document map.

    Args:
        document_map: (batch, seq_len + segments + 3) int32.
        seq_len: tokens per sample.

    Returns:
        Position ids (batch, seq_len), a view, and document boundaries (batch, segments + 1), contiguous; both int32.
    """
    return document_map[:, :seq_len], document_map[:, seq_len:-2].contiguous()


def decode_sample_numbers(document_map: torch.Tensor) -> torch.Tensor:
    """Take the sample numbers, (batch,) int64, out of a document map."""
    return document_map[:, -2:].clone(memory_format=torch.contiguous_format).view(torch.int64)[:, 0]
