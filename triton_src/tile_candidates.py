"""Which launch parameters are worth measuring, and the table that measurements make."""

import dataclasses
import math
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from jmoe.triton_src.tile_tables import KINDS, allowed_by
from jmoe.triton_src.tiles import LaunchTable, bound_of, tile_for, unbounded

ALSO = {"num_stages": (2, 3, 4), "shrink_splits": (1, 2, 4, 8)}
"""Values worth a try beside those that the tables have for a field."""

ROWS = tuple(name for name, kind in KINDS.items() if kind.bound == "rows")
"""Sections whose tiles are chosen by rows; the others' by what cannot be measured at any size at will."""


def candidates(section: str, tiles: Sequence[Any], work: float, fields: Sequence[str] = ()) -> list[tuple[Any, ...]]:
    """Contents of a section to try for so much work, those at hand first.

    Of a section by rows each is one tile, for any number of rows: the one at hand, those of other rows, and those that
    differ from it in one field. Of another section one tile differs in one field.

    fields: those that may differ; all of them if there are none, and then other rows' tiles are tried too.
    """
    kind = KINDS[section]
    names = fields or [field.name for field in dataclasses.fields(kind) if field.name != kind.bound]
    if section not in ROWS:
        found = [tuple(tiles)]
        for i, tile in enumerate(tiles):
            found += [(*tiles[:i], other, *tiles[i + 1 :]) for other in neighbours(tile, tiles, names)]
    else:
        start = unbounded(tile_for(tuple(tiles), work))
        others = [] if fields else [unbounded(tile) for tile in tiles]
        found = [(tile,) for tile in (start, *others, *neighbours(start, tiles, names))]
    return list(dict.fromkeys(found))


def neighbours(tile: Any, tiles: Sequence[Any], names: Sequence[str]) -> Iterator[Any]:
    """Tiles that differ in one of these fields.

    It takes the values that it has in the table's other tiles, those in ALSO, and half and twice its own.
    """
    hints = typing.get_type_hints(type(tile), include_extras=True)
    for name in names:
        own = getattr(tile, name)
        values = [*(getattr(other, name) for other in tiles), *ALSO.get(name, ())]
        values += [] if name in ALSO else [own // 2, 2 * own]
        for value in dict.fromkeys(values):
            if value != own and value in allowed_by(hints[name]):
                yield dataclasses.replace(tile, **{name: value})


def forced(table: LaunchTable, section: str, tiles: tuple[Any, ...]) -> LaunchTable:
    """The table with these tiles in a section, so that a layer uses them where it can."""
    only_grouped = {"packed_decode": ()} if section == "packed_grouped_matmul" else {}
    return table.over({section: tiles} | only_grouped)


def assemble[T: Any](best: Sequence[tuple[float, T]]) -> tuple[T, ...]:
    """A section of (rows, best tile there), by increasing rows.

    Between two numbers of rows their geometric mean parts the tiles; the last tile is for all that follow.
    """
    section: list[T] = []
    for i, (rows, tile) in enumerate(best):
        bound = math.sqrt(rows * best[i + 1][0]) if i + 1 < len(best) else math.inf
        tile = dataclasses.replace(tile, rows=bound)
        if section and dataclasses.replace(section[-1], rows=bound) == tile:
            section.pop()
        section.append(tile)
    return tuple(section)


def cut(section: Sequence[Any], bound: float) -> tuple[Any, ...]:
    """A section of which tiles are for up to `bound` rows alone."""
    kept = [tile for i, tile in enumerate(section) if i == 0 or bound_of(section[i - 1]) < bound]
    return (*kept[:-1], dataclasses.replace(kept[-1], rows=min(bound, bound_of(kept[-1])))) if bound > 0 else ()
