"""The document map: position ids and document boundaries of a micro-batch in one small integer tensor.

Pipeline stages send it along with the hidden state. Each stage prepares its attention from it; no mask is ever sent.
"""

import torch


def encode_document_map(position_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Join position ids and document boundaries of a micro-batch.

    Args:
        position_ids: (batch, seq) int32.
        cu_seqlens: (batch, max_docs + 1) int32, boundaries of the segments of each row, padded with seq.

    Returns:
        (batch, seq + max_docs + 1) int32.
    """
    return torch.cat((position_ids, cu_seqlens), 1)


def decode_document_map(document_map: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a document map into the two tensors that `encode_document_map` joined.

    Args:
        document_map: (batch, seq_len + max_docs + 1) int32.
        seq_len: tokens per sample.

    Returns:
        Position ids (batch, seq_len), a view, and document boundaries (batch, max_docs + 1), contiguous; both int32.
    """
    return document_map[:, :seq_len], document_map[:, seq_len:].contiguous()
