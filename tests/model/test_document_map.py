"""The document map: round trip, shapes, dtype, and contiguous boundaries."""

import pytest
import torch
from decoders import packed

from megazh.model.document_map import decode_document_map, decode_sample_numbers, encode_document_map

ROWS = [[6, 5, 5], [3, 1, 9], [16]]


def test_round_trip() -> None:
    _, _, position_ids, cu_seqlens = packed(ROWS, 16)
    found = decode_document_map(encode_document_map(position_ids, cu_seqlens), 16)
    assert torch.equal(found[0], position_ids)
    assert torch.equal(found[1], cu_seqlens)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("seq_len", [16, 17])
def test_round_trip_of_sample_numbers(rows: int, seq_len: int) -> None:
    _, _, position_ids, cu_seqlens = packed(ROWS[:rows], seq_len)
    numbers = torch.tensor([2**40 + 3, 0, 2**31])[:rows]
    document_map = encode_document_map(position_ids, cu_seqlens, numbers)
    found = decode_sample_numbers(document_map)
    assert found.dtype == torch.int64
    assert torch.equal(found, numbers)
    assert torch.equal(decode_document_map(document_map, seq_len)[1], cu_seqlens)
    assert (decode_sample_numbers(encode_document_map(position_ids, cu_seqlens)) == -1).all()


def test_shapes_and_dtype() -> None:
    _, _, position_ids, cu_seqlens = packed(ROWS, 16)
    document_map = encode_document_map(position_ids, cu_seqlens)
    assert (document_map.shape, document_map.dtype) == ((3, 16 + 7 + 2), torch.int32)
    found = decode_document_map(document_map, 16)
    assert [(tensor.shape, tensor.dtype) for tensor in found] == [((3, 16), torch.int32), ((3, 7), torch.int32)]


def test_decoded_boundaries_are_contiguous_in_memory() -> None:
    """`searchsorted` and `gather` read them as rows of max_docs + 1."""
    _, _, position_ids, cu_seqlens = packed(ROWS, 16)
    document_map = encode_document_map(position_ids, cu_seqlens)
    assert not document_map[:, 16:].is_contiguous()
    assert decode_document_map(document_map, 16)[1].is_contiguous()
