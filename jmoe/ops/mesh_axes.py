"""Which axes of a mesh split the tokens and the experts of a call, as types tell on explicit axes, or as named."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jmoe.ops.call import Tokens, lora_has_layers
from jmoe.ops.experts import Experts, Lora

type Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Names of mesh axes for jmoe.moe, for meshes whose axes are Auto; static.

    experts: what splits the experts, and LoRA along its axis of experts: one axis or several.
    tokens: what splits x along its axes of tokens, as a PartitionSpec of these or the name for the first of them.

    Raises:
      ValueError: they are not names, or an axis of the mesh would split two axes of tokens.
    """

    experts: str | Names = ()
    tokens: str | tuple[str | Names | None, ...] | P = ()

    def __post_init__(self) -> None:
        for field in ("experts", "tokens"):
            value = getattr(self, field)
            if not all(isinstance(name, str) for name in names_of((value,) if isinstance(value, str) else value)):
                raise ValueError(f"mesh_axes.{field} must be names of mesh axes, got {value!r}")
        object.__setattr__(self, "experts", names_of((self.experts,)))
        entries = [self.tokens] if isinstance(self.tokens, str) else list(self.tokens)
        while entries and entries[-1] is None:
            entries.pop()
        tokens = P(*entries)
        if len(set(names_of(tokens))) < len(names_of(tokens)):
            raise ValueError(f"mesh_axes.tokens must name each mesh axis once, got {self.tokens!r}")
        object.__setattr__(self, "tokens", tokens)

    def __bool__(self) -> bool:
        return bool(names_of((self.experts,)) or names_of(self.tokens))


def names_of(entries: Any) -> Names:
    """The mesh axes in entries of a PartitionSpec, in order."""
    names: list[Any] = []
    for entry in entries:
        names += entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return tuple(names)


def specs_of(tokens: Tokens, experts: Experts, lora: Lora | None, stacked: bool, axes: MeshAxes) -> tuple[Any, ...]:
    """The PartitionSpec of each array of these three, like them.

    stacked: whether the experts have a leading axis for layers.
    """
    of_experts = jax.tree.map(lambda _: _at(int(stacked), axes.experts), experts)
    of_lora = None
    if lora is not None:
        factor = _at(1 + lora_has_layers(lora), axes.experts)
        names = [field.name for field in dataclasses.fields(lora) if getattr(lora, field.name) is not None]
        specs: dict[str, Any] = {name: P() if name.endswith("_scale") else factor for name in names}
        of_lora = dataclasses.replace(lora, **specs)
    return jax.tree.map(lambda _: axes.tokens, tokens), of_experts, of_lora


def _at(axis: int, names: Any) -> P:
    return P(*[None] * axis, names or None)


def mesh_of(arrays: Any) -> AbstractMesh:
    """The mesh that is set, or else the one that one of these arrays lies on; empty if there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    meshes = [mesh, *(jax.typeof(array).sharding.mesh for array in jax.tree.leaves(arrays))]
    return next((mesh for mesh in meshes if mesh.axis_names), meshes[0])


def explicit_axes(tokens: Tokens, experts: Experts, lora: Lora | None, stacked: bool) -> MeshAxes:
    """The axes that the types of the arrays name, explicit as jax.make_mesh makes them; none where all are replicated.

    Raises:
      ValueError: weights are split along another axis than that of experts, or differently from each other, or x is
        split along H.
    """
    spec = tuple(jax.typeof(tokens.x).sharding.spec)
    of_x = spec + (None,) * (tokens.x.ndim - len(spec))
    if of_x[-1] is not None:
        raise ValueError(
            f"x {tokens.x.shape} is split over mesh axis {of_x[-1]!r} along its last axis, H; jmoe.moe takes x "
            f"whose other axes are split: jax.sharding.reshard(x, {P(*of_x[:-1])}) gathers them"
        )
    found: dict[str, Names] = {}
    for name, array, axis in weight_arrays(experts, lora, stacked):
        split = {i: names_of((entry,)) for i, entry in enumerate(jax.typeof(array).sharding.spec) if entry is not None}
        if axis is not None and (names := split.pop(axis, ())):
            found[name] = names
        for other, names in split.items():
            raise ValueError(wrong_axis(name, array.shape, names, other, axis))
    if len(set(found.values())) > 1:
        raise ValueError(f"experts and LoRA must be split along experts over the same mesh axes, got {found}")
    return MeshAxes(next(iter(found.values()), ()), P(*of_x[:-1]))


def weight_arrays(experts: Experts, lora: Lora | None, stacked: bool) -> Iterator[tuple[str, jax.Array, int | None]]:
    """(name, array, its axis of experts or None) of each array of weights."""
    for path, array in jax.tree.leaves_with_path(experts):
        yield f"experts{jax.tree_util.keystr(path)}", array, int(stacked)
    for path, array in jax.tree.leaves_with_path(lora):
        name = jax.tree_util.keystr(path)
        yield f"lora{name}", array, None if name.endswith("_scale") else 1 + lora_has_layers(lora)


def check_divides(axes: MeshAxes, mesh: AbstractMesh, tokens: tuple[int, ...], experts: int) -> None:
    """Raises ValueError unless the mesh has these axes, not manual ones, and they divide the tokens and the experts."""
    names = names_of((*names_of((axes.experts,)), *axes.tokens))
    for name in names:
        if name not in mesh.axis_names:
            where = f"the mesh has {list(mesh.axis_names)}" if mesh.axis_names else "no mesh is set: jax.set_mesh(mesh)"
            raise ValueError(f"mesh_axes names {name!r}, but {where}")
        if name in mesh.manual_axes:
            raise ValueError(
                f"mesh_axes names {name!r}, over which a jax.shard_map around this call has split its arrays already: "
                "leave it out, and pass expert_offset"
            )
    if len(axes.tokens) > len(tokens):
        raise ValueError(f"mesh_axes.tokens {axes.tokens} has more entries than x has axes of tokens, {tokens}")
    of_experts = names_of((axes.experts,))
    sizes = [(f"{experts} experts", experts, of_experts)]
    sizes += [(f"{size} tokens", size, names_of((entry,))) for size, entry in zip(tokens, axes.tokens, strict=False)]
    for what, size, split in sizes:
        parts = math.prod(mesh.shape[name] for name in split)
        if size % parts:
            raise ValueError(uneven(what, size, split, parts, mesh.size))


def uneven(what: str, size: int, names: Names, parts: int, devices: int) -> str:
    """The message for a number that mesh axes do not divide, with what would fit."""
    fits = [n for n in range(1, min(size, devices) + 1) if size % n == 0]
    return (
        f"{what} cannot be split evenly over {_in_words(names)} of {parts} devices; "
        f"of up to {devices} devices these numbers fit: {', '.join(map(str, fits))}"
    )


def wrong_axis(name: str, shape: tuple[int, ...], names: Names, axis: int, experts: int | None) -> str:
    """The message for a weight that is split along another axis than that of experts."""
    allowed = "along no axis" if experts is None else f"along the axis of experts, {experts}, alone"
    return (
        f"{name} {shape} is split over {_in_words(names)} along axis {axis}; jmoe.moe takes weights that are split "
        f"{allowed}: their rows and columns must be whole on each device (jax.sharding.reshard gathers them, or "
        "jax.lax.with_sharding_constraint on Auto axes)"
    )


def _in_words(names: Names) -> str:
    return f"mesh axis {names[0]!r}" if len(names) == 1 else f"mesh axes {names}"
