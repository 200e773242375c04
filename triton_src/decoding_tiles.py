"""What a program of decoding's small launches takes on, by the number of rows."""

from typing import NamedTuple


class NormLinearTile(NamedTuple):
    """Rows one after another, and columns of the product, which are held in registers meanwhile."""

    rows: int
    columns: int
    num_warps: int


NORM_LINEAR_TILES = {4: NormLinearTile(1, 2, 4), 32: NormLinearTile(1, 4, 8), 64: NormLinearTile(4, 4, 8)}
"""By the most rows that they are for. For one row a program's own reads decide, for many how often weights are read."""


def norm_linear_tile(rows: int) -> NormLinearTile:
    """The tile for so many rows, the last for more than the table has."""
    return next((tile for most, tile in NORM_LINEAR_TILES.items() if rows <= most), NORM_LINEAR_TILES[64])
