"""A user's tile tables: measured by `jmoe tune` on a GPU, kept in the user's cache and used on GPUs of that name.

The file is JSON: "portable" and "packed", each a list of tiles by increasing rows. A tile is its kind, the name of its
class in jmoe.triton_src.tiles, and that class's fields; rows of null is any number.
"""

import dataclasses
import itertools
import json
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jmoe.triton_src.tiles import PACKED_TILES, PackedTile, Tile, TileTables, tiles_of
from jmoe.triton_src.user_cache import user_cache

KINDS: dict[str, dict[str, type]] = {
    "portable": {"Tile": Tile},
    "packed": {kind.__name__: kind for kind in typing.get_args(PackedTile.__value__)},
}
"""The classes of tiles that each table may hold, by name."""

ALSO = {"num_stages": (2, 3, 4), "num_warps": (4, 8)}
"""Values worth a try on a GPU that was not measured, beside those that the tables have for a field."""


def user_table(device: str) -> Path:
    """Where the table of a GPU of this name lies, or would lie."""
    return user_cache() / "tiles" / (re.sub("[^a-z0-9]+", "_", device.lower()).strip("_") + ".json")


def read_user_table(device: str) -> TileTables | None:
    """The user's table for a GPU of this name, or None if there is none.

    Raises:
      ValueError: see parse.
    """
    file = user_table(device)
    return parse(file.read_text(), str(file)) if file.exists() else None


def parse(text: str, file: str) -> TileTables:
    """The tables of a file's text.

    Raises:
      ValueError: it is no such table; the message names the file and what in it is wrong.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; remove it or run `jmoe tune` again") from None
    try:
        if not isinstance(content, dict):
            raise ValueError(f"must be an object, got {content!r}")
        return TileTables(**{name: parse_table(content.get(name), name) for name in KINDS})
    except ValueError as error:
        raise ValueError(f"{file}: {error}; remove it or run `jmoe tune` again") from None


def parse_table(content: Any, name: str) -> tuple[Any, ...]:
    """One table's tiles."""
    if not isinstance(content, list):
        raise ValueError(f"{name} must be a list of tiles, got {content!r}")
    tiles = tuple(parse_tile(fields, f"{name}[{i}]", KINDS[name]) for i, fields in enumerate(content))
    rows = [0.0, *(tile.rows for tile in tiles)]
    if any(a >= b for a, b in itertools.pairwise(rows)):
        raise ValueError(f"{name} must have increasing rows, got {rows[1:]}")
    if tiles and tiles[-1].rows != math.inf:
        raise ValueError(f"{name}[{len(tiles) - 1}].rows must be null, as no tile follows, got {tiles[-1].rows}")
    return tiles


def parse_tile(content: Any, place: str, kinds: dict[str, type]) -> Any:
    """One tile, of the kind that it names."""
    if not isinstance(content, dict):
        raise ValueError(f"{place} must be an object, got {content!r}")
    values = dict(content)
    name = values.pop("kind", None)
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"{place}.kind must be {' or '.join(kinds)}, got {name!r}")
    kind = kinds[name]
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name not in values:
            raise ValueError(f"{place}.{field.name} is missing")
    for field_name, value in values.items():
        if field_name not in hints:
            raise ValueError(f"{place}.{field_name} is no field of {name}")
        values[field_name] = parse_value(value, hints[field_name], f"{place}.{field_name}")
        if field_name == "stages" and value < 2:
            raise ValueError(f"{place}.stages must be at least 2, one to fill while another is read, got {value}")
    return kind(**values)


def parse_value(value: Any, hint: Any, place: str) -> Any:
    """A field's value: a positive number, or null for rows without bound."""
    if hint is float and value is None:
        return math.inf
    wanted = (int, float) if hint is float else (int,)
    if isinstance(value, bool) or not isinstance(value, wanted) or not 0 < value < math.inf:
        raise ValueError(
            f"{place} must be a positive {'number or null' if hint is float else 'integer'}, got {value!r}"
        )
    return value


def as_json(tables: TileTables) -> dict[str, list[dict[str, Any]]]:
    """The tables as parse takes them."""
    return {name: [tile_as_json(tile) for tile in getattr(tables, name)] for name in KINDS}


def tile_as_json(tile: Any) -> dict[str, Any]:
    """One tile."""
    fields = dataclasses.asdict(tile)
    return {"kind": type(tile).__name__, **fields, "rows": None if tile.rows == math.inf else tile.rows}


def candidates[T: Any](table: Sequence[T], start: T) -> list[T]:
    """Tiles to try instead of `start`, which comes first: all of a table, and those that differ from it in one field.

    A field takes the values that it has in the table's other tiles of that kind, and those in ALSO. All are for any
    number of rows.
    """
    unbounded = [dataclasses.replace(tile, rows=math.inf) for tile in (start, *table)]
    tried = dict.fromkeys(unbounded)
    for field in dataclasses.fields(start):
        alike = [getattr(tile, field.name) for tile in unbounded if type(tile) is type(start)]
        for value in (*alike, *(ALSO.get(field.name, ()))):
            tried[dataclasses.replace(unbounded[0], **{field.name: value})] = None
    return list(tried)


def assemble[T: Any](best: Sequence[tuple[float, T]]) -> tuple[T, ...]:
    """A table of (average rows, best tile there), by increasing rows.

    Between two numbers of rows their geometric mean parts the tiles; the last tile is for all that follow.
    """
    table: list[T] = []
    for i, (rows, tile) in enumerate(best):
        bound = math.sqrt(rows * best[i + 1][0]) if i + 1 < len(best) else math.inf
        tile = dataclasses.replace(tile, rows=bound)
        if table and dataclasses.replace(table[-1], rows=bound) == tile:
            table.pop()
        table.append(tile)
    return tuple(table)


def built_in(capability: int) -> TileTables:
    """The package's own tables for a GPU of this compute capability; no packed tiles where no kernel reads them."""
    return TileTables(tiles_of(capability), PACKED_TILES.get(capability, ()))
