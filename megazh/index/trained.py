"""Labels of packed samples by the mask of their index."""

import numpy as np
import numpy.typing as npt

from megazh.index.compiled import compiled
from megazh.index.mask import Mask
from megazh.index.packing import SampleTable

Int64s = npt.NDArray[np.int64]


def keep_trained(table: SampleTable, starts: Int64s, mask: Mask) -> SampleTable:
    """Count the labels that a mask trains, without reading tokens, and leave out samples that have none.

    Args:
        table: the packed samples of an index.
        starts: (documents + 1,) offset of each document of the index in its tokens, and the number of tokens.
        mask: the mask of the index, not empty.
    """
    valid = _count(table.document, table.offset, table.length, table.first_piece, starts, mask)
    kept = valid > 0
    pieces = np.diff(table.first_piece)
    of_kept = np.repeat(kept, pieces)
    return SampleTable(
        document=table.document[of_kept],
        offset=table.offset[of_kept],
        length=table.length[of_kept],
        first_piece=np.concatenate([np.zeros(1, np.int64), np.cumsum(pieces[kept], dtype=np.int64)]),
        valid_labels=valid[kept],
        untrained=np.array([np.count_nonzero(~kept)], np.int64),
    )


@compiled()
def _count(document: Int64s, offset: Int64s, length: Int64s, first_piece: Int64s, starts: Int64s, mask: Mask) -> Int64s:
    """(samples,) number of trained labels."""
    valid = np.zeros(len(first_piece) - 1, np.int64)
    for sample in range(len(valid)):
        for piece in range(first_piece[sample], first_piece[sample + 1]):
            begin = starts[document[piece]] + offset[piece]
            # The label of the last token is the next one, unless the document ends.
            end = min(begin + length[piece] + 1, starts[document[piece] + 1])
            for token in range(begin + 1, end):
                valid[sample] += (mask[token >> 3] >> (token & 7)) & 1
    return valid
