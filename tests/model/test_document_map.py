"""The document map: round trip, shapes, dtype, and contiguous boundaries."""

import torch
from decoders import packed

from megazh.model.document_map import decode_document_map, encode_document_map

ROWS = [[6, 5, 5], [3, 1, 9], [16]]


def test_round_trip() -> None:
    _, _, position_ids, cu_seqlens = packed(ROWS, 16)
    found = decode_document_map(encode_document_map(position_ids, cu_seqlens), 16)
    assert torch.equal(found[0], position_ids)
    assert torch.equal(found[1], cu_seqlens)


def test_shapes_and_dtype() -> None:
    _, _, position_ids, cu_seqlens = packed(ROWS, 16)
    document_map = encode_document_map(position_ids, cu_seqlens)
    assert (document_map.shape, document_map.dtype) == ((3, 16 + 7), torch.int32)
    found = decode_document_map(document_map, 16)
    assert [(tensor.shape, tensor.dtype) for tensor in found] == [((3, 16), torch.int32), ((3, 7), torch.int32)]


def test_decoded_boundaries_are_contiguous_in_memory() -> None:
    """`searchsorted` and `gather` read them as rows of max_docs + 1."""
    _, _, position_ids, cu_seqlens = packed(ROWS, 16)
    document_map = encode_document_map(position_ids, cu_seqlens)
    assert not document_map[:, 16:].is_contiguous()
    assert decode_document_map(document_map, 16)[1].is_contiguous()
