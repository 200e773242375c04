"""Tile sizes and launch parameters as data: one table per GPU family, chosen by rows an expert gets on average.

sm_90 was measured on an H100 80GB HBM3 with gpt-oss-20b's sizes; the other families use the same tiles, which fit their
shared memory and have not been measured there.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of a grouped product's tiles, for experts with up to `rows` rows on average."""

    rows: float
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    shrink_block_k: int = 64  # not measured


# Beside each: microseconds of gate_up + down on the H100, of this tile and of the next best of the 45 to 76 settings
# tried at that number of tokens. Neighbours are often within the noise of one run.
_SINGLE = Tile(rows=1, block_m=16, block_n=32, block_k=128, num_warps=2, num_stages=3)  # 1 token: 43.9, 44.4
_FEW = Tile(rows=16, block_m=16, block_n=64, block_k=128, num_warps=2, num_stages=3)  # 16 tokens: 245, 249
_SOME = Tile(rows=96, block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=3)  # 256 tokens: 407, 408
_MORE = Tile(rows=256, block_m=128, block_n=64, block_k=64, num_warps=4, num_stages=3)  # 1024 tokens: 936, 937
_MANY = Tile(rows=math.inf, block_m=128, block_n=128, block_k=64, num_warps=4, num_stages=3)  # 4096 tokens: 2464, 2516

TILES: dict[int, tuple[Tile, ...]] = {
    80: (_SINGLE, _FEW, _SOME, _MORE, _MANY),
    90: (_SINGLE, _FEW, _SOME, _MORE, _MANY),
    100: (_SINGLE, _FEW, _SOME, _MORE, _MANY),
}
"""Compute capability * 10 -> tiles by increasing rows."""


@dataclasses.dataclass(frozen=True)
class PackedTile:
    """Sizes of the packed product's tiles, for experts with up to `rows` rows on average."""

    rows: float
    block_m: int
    ahead: int


# Beside each: microseconds of gate_up + down on the H100, launched from torch, of this tile and of the next best of the
# six tried. At 512 rows (4096 tokens) 32 rows and 3 blocks took 4565, about what unpacking at each call and the
# portable kernel take.
PACKED_TILES: dict[int, tuple[PackedTile, ...]] = {
    90: (
        PackedTile(rows=1, block_m=8, ahead=5),  # 1 token: 31, 33; 4 tokens: 78, 80
        PackedTile(rows=4, block_m=8, ahead=3),  # 16 tokens: 149, 152
        PackedTile(rows=8, block_m=16, ahead=5),  # 64 tokens: 179, 184
        PackedTile(rows=16, block_m=16, ahead=3),  # 128 tokens: 223, 232
        PackedTile(rows=128, block_m=32, ahead=5),  # 256 tokens: 337, 370; 512: 594, 614; 1024: 1141, 1171
    ),
}
"""Compute capability * 10 -> tiles by increasing rows, for the GPUs and sizes whose kernels read packed weights."""


def choose_packed_tile(capability: int, pairs: int, experts: int) -> PackedTile | None:
    """The tile for packed weights, or None where no kernel reads them; arguments as in choose_tile."""
    average = pairs / min(pairs, experts)
    return next((tile for tile in PACKED_TILES.get(capability, ()) if average <= tile.rows), None)


def choose_tile(capability: int, pairs: int, experts: int) -> Tile:
    """The tile for `pairs` rows spread over `experts` experts on a GPU of this compute capability (90 is 9.0).

    Raises:
      NotImplementedError: the GPU is older than the oldest family in the table.
    """
    family = max((c for c in TILES if c <= capability), default=None)
    if family is None:
        raise NotImplementedError(f"jmoe's Triton kernels need compute capability 8.0 or later, got sm_{capability}")
    average = pairs / min(pairs, experts)
    return next(tile for tile in TILES[family] if average <= tile.rows)
