"""Meshes of devices by what is written on a command line: --mesh data=2,expert=4."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = {
    "data": "batches",
    "expert": "experts, and batches with them",
    "heads": "heads of attention",
    "model": "experts and heads, both over the same devices",
}
"""What an axis of a mesh may be named, and what it splits."""

REST = -1
"""The size that stands for all devices that the other axes leave."""


def parse_mesh_sizes(text: str, devices: int | None) -> dict[str, int]:
    """The sizes of `data=2,expert=4`, in this order; they multiply to the number of devices, and one may be -1.

    devices: None: any number, and -1 stays.

    Raises:
      ValueError: it is written otherwise, an axis is unknown or there twice, or the sizes do not fit the devices.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, size = (word.strip() for word in part.partition("="))
        if not equals or not size.removeprefix("-").isdecimal() or not size.isascii():
            raise ValueError(f"a mesh is written as data=2,expert=4, got {part!r} in {text!r}")
        if name not in AXES:
            raise ValueError(f"axes of a mesh are {', '.join(AXES)}, got {name!r}")
        if name in sizes:
            raise ValueError(f"each axis of a mesh is given once, got {name} twice in {text!r}")
        if int(size) < 1 and int(size) != REST:
            raise ValueError(f"the size of {name} must be at least 1, or -1 for all other devices, got {size}")
        sizes[name] = int(size)
    if not sizes:
        raise ValueError(f"a mesh is written as data=2,expert=4, got {text!r}")
    if "model" in sizes and (both := [name for name in ("expert", "heads") if name in sizes]):
        raise ValueError(f"model splits experts and heads, so that {both[0]} cannot be beside it in {text!r}")
    return sizes if devices is None else fill_rest(sizes, devices)


def fill_rest(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The sizes with what -1 stands for.

    Raises:
      ValueError: there are several -1, or the sizes do not multiply to the number of devices; with what would fit.
    """
    rest = [name for name, size in sizes.items() if size == REST]
    if len(rest) > 1:
        raise ValueError(f"one axis of a mesh may be -1, got {' and '.join(rest)}")
    given = math.prod(size for size in sizes.values() if size != REST)
    there = "there is 1 device" if devices == 1 else f"there are {devices} devices"
    if rest:
        if devices % given:
            raise ValueError(f"{in_words(sizes)} needs a multiple of {given} devices, and {there}")
        return {name: devices // given if size == REST else size for name, size in sizes.items()}
    if given != devices:
        fits = [
            f"{name}={devices // others}" for name, size in sizes.items() if devices % (others := given // size) == 0
        ]
        would = f"; with the others as they are {' or '.join(fits)} would fit" if fits else ""
        raise ValueError(f"{in_words(sizes)} is of {given} devices, and {there}{would}")
    return dict(sizes)


def in_words(sizes: Mapping[str, int]) -> str:
    """The sizes as they are written."""
    return "mesh " + ",".join(f"{name}={size}" for name, size in sizes.items())


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `data=2,expert=4`, of all devices of all processes or of these; its axes are Auto.

    Devices of the last axis are next to each other: name that last which sends most.

    Raises:
      ValueError: as parse_mesh_sizes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh_sizes(text, len(devices))
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def planned_mesh(text: str) -> AbstractMesh:
    """The mesh of `data=2,expert=4`, of as many devices as the sizes say, here or not; -1 is of those that are here.

    Raises:
      ValueError: as parse_mesh_sizes.
    """
    sizes = parse_mesh_sizes(text, None)
    if REST in sizes.values():
        sizes = fill_rest(sizes, jax.device_count())
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
