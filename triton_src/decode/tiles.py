"""What a program of decoding's small launches takes on, by the number of rows."""

from typing import NamedTuple


class NormLinearTile(NamedTuple):
    """Rows one after another, and columns of the product, which are held in registers meanwhile."""

    rows: int
    columns: int
    num_warps: int


NORM_LINEAR_TILES = {4: NormLinearTile(1, 2, 4), 32: NormLinearTile(1, 4, 8), 64: NormLinearTile(4, 4, 8)}
"""By the most rows that they are for. For one row a program's own reads decide, for many how often weights are read."""


class DecodeLinearTile(NamedTuple):
    """Columns and depth of the blocks that a dense product's program reads, num_stages - 1 of them ahead."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int


DECODE_LINEAR_TILES = {
    1: DecodeLinearTile(4, 1024, 4, 1),
    16: DecodeLinearTile(16, 256, 2, 4),
    64: DecodeLinearTile(32, 128, 4, 4),
}
"""By the most rows that they are for."""


def norm_linear_tile(rows: int) -> NormLinearTile:
    """The tile of norm_linear for so many rows."""
    return for_rows(NORM_LINEAR_TILES, rows)


def decode_linear_tile(rows: int) -> DecodeLinearTile:
    """The tile of decode_linear for so many rows."""
    return for_rows(DECODE_LINEAR_TILES, rows)


def for_rows[T](tiles: dict[int, T], rows: int) -> T:
    """The first that is for so many rows, or the last."""
    return next((tile for most, tile in tiles.items() if rows <= most), tiles[max(tiles)])
