"""Block sizes of the attention kernels, by card and size of a head: a pure function, for launches and for tests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel; the larger of `queries` and `keys` must be a multiple of the smaller."""

    queries: int
    """Queries per block."""
    keys: int
    """Keys per block."""
    warps: int
    """Warps per program."""
    stages: int
    """Stages of Triton's software pipelining of loads."""
    split: bool = True
    """Whether blocks that need no mask get a separate loop without one."""


@dataclass(frozen=True)
class AttentionTiles:
    """Block sizes of the three attention kernels."""

    forward: Tiles
    queries: Tiles
    """Of the backward kernel that owns queries."""
    keys: Tiles
    """Of the backward kernel that owns keys; as many keys as `queries` has queries, since both kernels write one row of
    partial sums per block."""


_SMALL_HEAD = 64
"""Largest head, in dimensions, for which the first of a pair of sizes holds."""

# Hopper: the fastest of several sizes tried on an H200 with documents of 500 tokens.
_HOPPER = (
    AttentionTiles(Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 2, split=False)),
    AttentionTiles(
        Tiles(64, 64, 4, 2, split=False), Tiles(64, 32, 4, 2, split=False), Tiles(32, 64, 4, 2, split=False)
    ),
)
# Ampere and Ada (a 3090 is 8.6): chosen by compilation (tools/bench/kernels.py), not measured on a card. On 8.6 and 8.9
# no register is spilled, and a multiprocessor of a 3090 (65,536 registers, 100 KiB of shared memory) holds 12, 12 and 8
# warps of these kernels with heads of 64 dimensions, 8 with larger ones. With Hopper's sizes the kernel that owns keys
# spills with heads of 48 and 64 dimensions, and larger heads leave 4 warps.
_AMPERE = (
    AttentionTiles(Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 3), Tiles(32, 64, 4, 2, split=False)),
    AttentionTiles(
        Tiles(64, 32, 4, 2, split=False), Tiles(64, 32, 8, 2, split=False), Tiles(64, 64, 8, 2, split=False)
    ),
)


def attention_tiles(capability: tuple[int, int], head_dim: int) -> AttentionTiles:
    """The block sizes that the attention kernels are launched with.

    Args:
        capability: compute capability of the card, such as (8, 6).
        head_dim: dimensions of each head.
    """
    # 12.x (GeForce cards after Ada) has Ampere's instructions and shared memory, not Hopper's.
    sizes = _AMPERE if capability[0] in (8, 12) else _HOPPER
    return sizes[head_dim > _SMALL_HEAD]
