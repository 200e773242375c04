"""Tables of launch parameters as files: the package's own, in the folder tables, and a user's, written by `jmoe tune`.

Both are JSON of one form, so that a measured table can become one of the package's: "version", "device", the name of
the GPU, "capability", its compute capability * 10, and either "tiles" or "same_as", the name of a GPU that has them.
"tiles" has a section for each field of jmoe.triton_src.tiles.LaunchTable, a list of that section's tiles by increasing
bounds; a bound of null is any amount. Beside a tile's fields there may be "measured", text. A user's file may leave
sections out, for which the package's stand.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
import typing
from pathlib import Path
from typing import Any

from jmoe.triton_src.tile_fields import OneOf
from jmoe.triton_src.tiles import OLDEST, Bounded, LaunchTable, bound_of
from jmoe.triton_src.user_cache import user_cache

VERSION = 2
"""Of the files' form. The first, without a version, had forward products alone."""

KINDS: dict[str, type[Bounded]] = {
    name: typing.get_args(hint)[0] for name, hint in typing.get_type_hints(LaunchTable, include_extras=True).items()
}
"""The kind of tile that each section holds."""

PACKED = ("packed_decode", "packed_grouped_matmul", "packed_dgrad")
"""Sections that a table of the package may lack: no kernel reads packed weights there."""

OPEN = ("packed_decode", "route_few")
"""Sections past whose last tile another section's are used."""

OWN = Path(__file__).parent / "tables"


def own_table(capability: int, device: str | None = None) -> LaunchTable:
    """The package's table for a GPU of this compute capability (90 is 9.0) and this name.

    That of the name, else that of the compute capability, else the default one.

    Raises:
      NotImplementedError: the GPU is older than the kernels support.
      ValueError: GPUs of this name have another compute capability.
    """
    if capability < OLDEST:
        raise NotImplementedError(f"jmoe's Triton kernels need compute capability 8.0 or later, got sm_{capability}")
    file = own_file(capability, device)
    content = read_own(file)
    if content.get("capability", capability) != capability:
        raise ValueError(f"{device} is sm_{content['capability']}, got sm_{capability}")
    return table_of_file(file)


def own_file(capability: int, device: str | None = None) -> Path:
    """The file of the package that own_table reads for a GPU."""
    if device is not None:
        named = OWN / file_name(device)
        if named.exists() and "device" in read_own(named):
            return named
    family = OWN / f"sm_{capability}.json"
    return family if family.exists() else OWN / "default.json"


@functools.cache
def read_own(file: Path) -> dict[str, Any]:
    """A file of the package."""
    return json.loads(file.read_text())


@functools.cache
def table_of_file(file: Path) -> LaunchTable:
    """The tiles of a file of the package, or those that it names."""
    content = read_own(file)
    if "same_as" in content:
        return table_of_file(OWN / file_name(content["same_as"]))
    return LaunchTable(**{**dict.fromkeys(PACKED, ()), **parse(json.dumps(content), str(file))})


def table_for(capability: int, device: str) -> LaunchTable:
    """The table for a GPU of this machine: the package's, and over it the user's for GPUs of that name.

    Raises:
      NotImplementedError, ValueError: as own_table, and read_user_table.
    """
    return own_table(capability, device).over(read_user_table(device) or {})


def origin_of(capability: int, device: str) -> str:
    """Whose table_for's table is, and of which GPU its values were measured: for people."""
    file = user_file(device)
    if file.exists():
        return f"the user's, {file}"
    own = read_own(own_file(capability, device))
    if "tiles" in own and own.get("device"):
        return f"jmoe's own for {own['device']}"
    values = f"{own['same_as']}'s" if "same_as" in own else "default"
    return f"jmoe's own, {values} values, of which none was measured on {device}: run jmoe tune"


def file_name(device: str) -> str:
    """What the file of a GPU of this name is called."""
    return re.sub("[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


def user_file(device: str) -> Path:
    """Where the user's table of a GPU of this name lies, or would lie."""
    return user_cache() / "tiles" / file_name(device)


def read_user_table(device: str) -> dict[str, tuple[Any, ...]] | None:
    """The sections of the user's table for a GPU of this name, or None if the file does not exist.

    Raises:
      ValueError: see parse.
    """
    file = user_file(device)
    return parse(file.read_text(), str(file)) if file.exists() else None


def parse(text: str, file: str) -> dict[str, tuple[Any, ...]]:
    """The sections that a file's text has.

    Raises:
      ValueError: the text is invalid, or of an older jmoe; the message names the file, the place and what is allowed.
    """
    again = "remove it or run `jmoe tune` again"
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; {again}") from None
    try:
        if not isinstance(content, dict):
            raise ValueError(f"must be an object, got {content!r}")
        if content.get("version") != VERSION:
            raise ValueError(f"version must be {VERSION}, this jmoe's, got {content.get('version')!r}")
        sections = content.get("tiles")
        if not isinstance(sections, dict):
            raise ValueError(f"tiles must be an object, got {sections!r}")
        return {name: parse_section(tiles, name) for name, tiles in sections.items()}
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {again}") from None


def parse_section(content: Any, name: str) -> tuple[Any, ...]:
    """One section's tiles."""
    if name not in KINDS:
        raise ValueError(f"{name} is not a section, which are {', '.join(KINDS)}")
    if not isinstance(content, list):
        raise ValueError(f"{name} must be a list of tiles, got {content!r}")
    kind = KINDS[name]
    bound = kind.bound
    tiles = tuple(parse_tile(fields, f"{name}[{i}]", kind) for i, fields in enumerate(content))
    bounds = [bound_of(tile) for tile in tiles]
    if any(a >= b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"{name} must have increasing {bound}, got {bounds}")
    if name in OPEN and (tiles or name in PACKED):
        return tiles
    if not tiles:
        raise ValueError(f"{name} must have a tile, got none")
    allowed = allowed_by(typing.get_type_hints(kind, include_extras=True)[bound])
    last, shown = (max(allowed.values),) * 2 if isinstance(allowed, OneOf) else (math.inf, "null")
    if bounds[-1] != last:
        raise ValueError(f"{name}[{len(tiles) - 1}].{bound} must be {shown}, as no tile follows, got {bounds[-1]}")
    return tiles


def parse_tile(content: Any, place: str, kind: type) -> Any:
    """One tile of this kind."""
    if not isinstance(content, dict):
        raise ValueError(f"{place} must be an object, got {content!r}")
    values = {name: value for name, value in content.items() if name != "measured"}
    hints = typing.get_type_hints(kind, include_extras=True)
    for name in hints:
        if name not in values:
            raise ValueError(f"{place}.{name} is missing")
    for name in values:
        if name not in hints:
            raise ValueError(f"{place}.{name} is not a field of {kind.__name__}")
    return kind(**{name: parse_value(values[name], hint, f"{place}.{name}") for name, hint in hints.items()})


def parse_value(value: Any, hint: Any, place: str) -> Any:
    """A field's value: one that kernels take, or of a bound a positive number, or null for any amount."""
    if hint is float:
        if value is None:
            return math.inf
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{place} must be a positive number or null, got {value!r}")
        return value
    allowed = allowed_by(hint)
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise ValueError(f"{place} must be {allowed}, got {value!r}")
    return value


def allowed_by(hint: Any) -> Any:
    """Which values a field's hint allows; None of a bound without limit."""
    return next(iter(getattr(hint, "__metadata__", ())), None)


def as_json(sections: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What a file must hold for parse to give these sections."""
    return {"version": VERSION, "tiles": {name: [tile_as_json(t) for t in tiles] for name, tiles in sections.items()}}


def tile_as_json(tile: Any) -> dict[str, Any]:
    """One tile."""
    return {name: None if value == math.inf else value for name, value in dataclasses.asdict(tile).items()}
