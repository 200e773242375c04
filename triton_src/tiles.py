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
    shrink_splits: int = 2  # parts of K that LoRA's shrink computes side by side; not measured


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
class DecodeTile:
    """packed_decode_kernel's parameters, for experts with up to `rows` rows on average."""

    rows: float
    block_m: int
    ahead: int
    stages: int  # of tokens in shared memory
    column_warps: int  # of the four, in gate_up's product; the others share these' columns along K
    down_column_warps: int  # in down's product
    last: int  # tiles of down that have other programs: shorter ones, which end the launch sooner
    last_column_warps: int  # in these, if that is fewer
    max_registers: int
    fetched_experts: int  # of the first of them routing fetches weights
    fetched_blocks: int  # of 64 along K
    shrink_splits: int = 4


@dataclasses.dataclass(frozen=True)
class GroupedTile:
    """packed_grouped_matmul_kernel's parameters, for experts with up to `rows` rows on average."""

    rows: float
    block_m: int
    smallest_m: int
    stages: int
    ahead: int
    max_registers: int
    shrink_splits: int = 2


@dataclasses.dataclass(frozen=True)
class DgradTile:
    """packed_dgrad_kernel's parameters."""

    smallest_m: int
    stages: int
    ahead: int
    max_registers: int


type PackedTile = DecodeTile | GroupedTile

# Beside each: microseconds on an H100 of this tile and of the next best tried: the whole layer's at 256 tokens,
# launched from torch, and gate_up's and down's for more. Below 256 the layer's in jax.lax.scan, of this tile alone:
# others were tried at 64 tokens only, where they were within the noise or slower. Cards differ by 3 % and more.
PACKED_TILES: dict[int, tuple[PackedTile, ...]] = {
    90: (
        # 1 token: 29.5
        DecodeTile(
            0.25,
            block_m=8,
            ahead=4,
            stages=4,
            column_warps=1,
            down_column_warps=1,
            last=1,
            last_column_warps=1,
            max_registers=80,
            fetched_experts=32,
            fetched_blocks=1,
        ),
        # 4 tokens: 67.1
        DecodeTile(
            1,
            block_m=8,
            ahead=4,
            stages=4,
            column_warps=4,
            down_column_warps=1,
            last=1,
            last_column_warps=1,
            max_registers=80,
            fetched_experts=32,
            fetched_blocks=2,
        ),
        # 16 tokens: 130.6
        DecodeTile(
            4,
            block_m=8,
            ahead=4,
            stages=4,
            column_warps=4,
            down_column_warps=2,
            last=6,
            last_column_warps=1,
            max_registers=72,
            fetched_experts=9,
            fetched_blocks=5,
        ),
        # 64 tokens: 158.2
        DecodeTile(
            8,
            block_m=16,
            ahead=4,
            stages=4,
            column_warps=4,
            down_column_warps=4,
            last=6,
            last_column_warps=2,
            max_registers=72,
            fetched_experts=9,
            fetched_blocks=5,
        ),
        # 256 tokens: 220, 224
        GroupedTile(rows=40, block_m=64, smallest_m=32, stages=3, ahead=2, max_registers=80),
        # 1024 tokens: 440, 451; 4096: 1416, 1443; 16384: 5465, 5688
        GroupedTile(rows=math.inf, block_m=128, smallest_m=32, stages=3, ahead=2, max_registers=128),
    ),
}
"""Compute capability * 10 -> tiles by increasing rows, for the GPUs whose kernels read packed weights."""

# In the order of the rows, microseconds at 256 and 4096 tokens of gate_up's on the H100: 155, 972; with tiles of the
# other number of rows 177 at 256.
PACKED_DGRAD_TILES: dict[int, dict[int, DgradTile]] = {
    90: {
        64: DgradTile(smallest_m=32, stages=3, ahead=3, max_registers=168),
        128: DgradTile(smallest_m=32, stages=3, ahead=3, max_registers=255),
    }
}
"""Compute capability * 10 -> rows of the routing's tile -> parameters, for GPUs whose kernels read packed weights."""


@dataclasses.dataclass(frozen=True)
class TileTables:
    """Tables measured on one GPU, to use instead of those above; the last tile of each is for any number of rows.

    An empty table is none: those above stand.
    """

    portable: tuple[Tile, ...]
    packed: tuple[PackedTile, ...]


def choose_packed_tile(capability: int, pairs: int, experts: int, tables: TileTables | None = None) -> PackedTile:
    """The tile for packed weights on a GPU that PACKED_TILES has; arguments as in choose_tile."""
    average = pairs / experts
    tiles = (tables and tables.packed) or PACKED_TILES[capability]
    return next(tile for tile in tiles if average <= tile.rows)


def choose_tile(capability: int, pairs: int, experts: int, tables: TileTables | None = None) -> Tile:
    """The tile for `pairs` rows spread over `experts` experts on a GPU of this compute capability (90 is 9.0).

    tables: measured on that GPU, if there are any.

    Raises:
      NotImplementedError: the GPU is older than the oldest family in the table.
    """
    average = pairs / experts
    tiles = (tables and tables.portable) or tiles_of(capability)
    return next(tile for tile in tiles if average <= tile.rows)


def tiles_of(capability: int) -> tuple[Tile, ...]:
    """TILES of the GPU's family; raises as choose_tile does."""
    family = max((c for c in TILES if c <= capability), default=None)
    if family is None:
        raise NotImplementedError(f"jmoe's Triton kernels need compute capability 8.0 or later, got sm_{capability}")
    return TILES[family]
