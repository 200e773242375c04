"""Changes of one weight's layout, expert by expert, on a mesh: each device changes the experts that it has."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jmoe.ops.mesh_axes import names_of, wrong_axis


def by_device[Weight, Changed](
    change: Callable[[Weight], Changed],
    change_each: Callable[[Weight], Changed],
    change_all: Callable[[Weight], Changed],
    weight: Weight,
) -> Changed:
    """change(weight), whose arrays lead with experts before and after.

    change_each: the same in one program, for what each device has.
    change_all: the same for arrays that Auto axes may split, unseen while they are traced: operations on all experts at
      once, which XLA splits as its operands are.

    Raises:
      ValueError: the weight is split along another axis than that of experts.
    """
    leaves = jax.tree.leaves(weight)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    shardings = [jax.typeof(leaf).sharding if traced else getattr(leaf, "sharding", None) for leaf in leaves]
    meshes = [each.mesh for each in shardings if isinstance(each, jax.NamedSharding)]
    meshes = [mesh for mesh in meshes if mesh.size > 1 or mesh.explicit_axes]
    if not meshes or jax.sharding.get_abstract_mesh().manual_axes:
        return change(weight)
    if traced and not meshes[0].explicit_axes:
        return change_all(weight)
    found = []
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(weight), shardings, strict=True):
        for axis, entry in enumerate(getattr(sharding, "spec", ())):
            if axis and entry is not None:
                name = f"weight{jax.tree_util.keystr(path)}"
                raise ValueError(wrong_axis(name, leaf.shape, names_of((entry,)), axis, 0))
        found.append(next(iter(getattr(sharding, "spec", ())), None))
    if traced and meshes[0].auto_axes:
        spec = jax.NamedSharding(meshes[0], P(found[0]))
        return jax.sharding.auto_axes(change_all, axes=meshes[0].explicit_axes, out_sharding=spec)(weight)
    return _compiled(change_each, meshes[0], P(found[0]), weight)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled(change: Callable[[Any], Any], mesh: Any, spec: P, weight: Any) -> Any:
    return jax.shard_map(change, mesh=mesh, in_specs=(spec,), out_specs=spec)(weight)
