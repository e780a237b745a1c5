"""The block sizes of the attention kernels: what the kernels require of them, and which card gets which."""

import pytest

from megazh.kernels.tiles import Tiles, attention_tiles

CARDS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("head_dim", [16, 48, 64, 96, 128])
@pytest.mark.parametrize("capability", CARDS)
def test_blocks_are_what_the_kernels_require(capability: tuple[int, int], head_dim: int) -> None:
    tiles = attention_tiles(capability, head_dim)
    for each in (tiles.forward, tiles.queries, tiles.keys):
        assert min(each.queries, each.keys) >= 16, "the least that a product on tensor cores takes"
        assert max(each.queries, each.keys) % min(each.queries, each.keys) == 0
    assert tiles.queries.queries == tiles.keys.keys, "both backward kernels write one row of sums per block"


def test_hopper_keeps_the_sizes_that_were_measured_on_it() -> None:
    small, large = attention_tiles((9, 0), 64), attention_tiles((9, 0), 128)
    assert small.forward == small.queries == Tiles(64, 32, 4, 3)
    assert small.keys == Tiles(64, 64, 4, 2, split=False)
    assert large.forward == Tiles(64, 64, 4, 2, split=False)
    assert large.queries == Tiles(64, 32, 4, 2, split=False)
    assert large.keys == Tiles(32, 64, 4, 2, split=False)
    assert attention_tiles((10, 0), 64) == small


def test_cards_with_99_kib_per_block_have_sizes_of_their_own() -> None:
    for head_dim in (64, 128):
        assert (
            attention_tiles((8, 6), head_dim) == attention_tiles((8, 9), head_dim) == attention_tiles((12, 0), head_dim)
        )
        assert attention_tiles((8, 6), head_dim) != attention_tiles((9, 0), head_dim)
