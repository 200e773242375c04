"""The layer on arrays that Auto axes of a mesh split by tokens, by experts or by both: no gather of weights.

What splits an array on Auto axes XLA's partitioner decides after JAX has traced and lowered. Of a loop over experts, or
of a launch, it knows no rule and would gather their weights. It asks this instead: each device computes its own tokens
on its own experts, and the results are summed over the axes that split the experts (gradients in weights, over those
that split the tokens). Weights that are split otherwise, along rows or columns, are refused.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmoe.ops.call import Call, Kept, buffers_of, lora_has_layers
from jmoe.ops.fingerprint import fingerprint
from jmoe.ops.mesh_axes import Names, names_of, uneven, wrong_axis

TOKENS, EXPERTS = "tokens", "experts"

FINGERPRINT = "fingerprint"
"""The name of an operand that nothing reads: by it JAX's persistent cache tells programs from each other."""


class Compute(Protocol):
    """The results of these names on one device, of a call, of what was kept of its forward pass, and of dy."""

    def __call__(self, results: Names, call: Call, kept: Kept | None, dy: jax.Array | None, /) -> list[jax.Array]: ...


class Split(NamedTuple):
    """What an axis of an array counts."""

    kind: str  # TOKENS or EXPERTS
    axis: int


class Axes(NamedTuple):
    """Mesh axes of one call: all that split its tokens, all that split its experts."""

    tokens: Names
    experts: Names

    @property
    def both(self) -> Names:
        """Those whose tokens are gathered, because they split experts too."""
        return tuple(name for name in self.tokens if name in self.experts)

    def without_both(self, kind: str) -> Names:
        """Those that split one kind alone."""
        return tuple(name for name in getattr(self, kind) if name not in self.both)


def what_splits(call: Call, name: str) -> Split | None:
    """What may be split of an operand or a result of the layer, by name; None for scalars and pre_activations."""
    name = name.removesuffix("_grad")
    if name in ("x", "y", "dy", "router_logits", "adapter_ids") or name.removeprefix("kept_") in ("experts", "weights"):
        return Split(TOKENS, 0)
    if name.endswith(("_a", "_b")):
        return Split(EXPERTS, 1 + lora_has_layers(call.lora))
    if name.startswith(("gate_up", "down")) and not name.endswith("_scale"):
        return Split(EXPERTS, int(call.layer is not None))
    return None


def may_be_split(arrays: list[jax.Array]) -> bool:
    """Whether Auto axes of a mesh may split one of these arrays once they are compiled.

    Not where they are on one device, nor inside jax.shard_map over all axes, which has split them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        return any(mesh.shape[name] > 1 for name in mesh.axis_names if name not in mesh.manual_axes)
    return jax.device_count() > 1 or any(jax.typeof(array).sharding.mesh.size > 1 for array in arrays)


def partitioned(compute: Compute, content: str, results: Names, *operands: Any) -> list[jax.Array]:
    """compute(results, *operands), with a rule for XLA's partitioner.

    content: all that compute depends on but for its arguments.

    operands: the call, what it kept or None, dy or None.
    results: y, the routing's experts and weights, pre_activations, and gradients, as x_grad. On several devices
      pre_activations are not computed, and are not read from what was kept: they are by position among the pairs of a
      device's own experts, which no array of all devices can hold. They are NaN.
    """
    leaves, tree = jax.tree.leaves(operands), jax.tree.structure(operands)
    if not may_be_split(leaves):
        return compute(results, *operands)
    call: Call = operands[0]
    names = (FINGERPRINT, *_names_of_operands(tree))
    splits = {name: what_splits(call, name) for name in (*names, *results)}

    def function(_: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
        return compute(results, *jax.tree.unflatten(tree, leaves))

    def partition(mesh: Mesh, arguments: Any, shapes: Any) -> tuple[Any, ...]:
        by_name = dict(zip(names, arguments, strict=True))
        if mesh.empty:
            whole = _sharding_of_whole_weights(by_name, splits)
            return mesh, function, [whole] * len(results), (whole,) * len(names)
        axes = _split_axes(mesh, by_name, splits)
        wanted = tuple(name for name in results if name != "pre_activations")

        def on_device(_: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
            whole = [_gathered(leaf, splits[name], axes) for name, leaf in zip(names[1:], leaves, strict=True)]
            call, kept, dy = jax.tree.unflatten(tree, whole)
            call = _from_its_first_expert(call, axes.experts)
            kept = kept and dataclasses.replace(kept, pre_activations=None)
            arrays = dict(zip(wanted, compute(wanted, call, kept, dy), strict=True))
            parts = {name: _summed(array, name, splits[name], axes) for name, array in arrays.items()}
            for name, shape in zip(results, shapes, strict=True):
                if name == "pre_activations":
                    rows = shape.shape[0] // _size(mesh, axes.tokens)
                    parts[name] = jnp.full((rows, shape.shape[1]), jnp.nan, shape.dtype)
            return [parts[name] for name in results]

        of_arguments = [_sharding(mesh, len(by_name[name].shape), splits[name], axes) for name in names]
        if "pre_activations" in names:  # not read, so left where it is
            of_arguments[names.index("pre_activations")] = by_name["pre_activations"].sharding
        return mesh, on_device, _of_results(mesh, shapes, axes), tuple(of_arguments)

    def infer(mesh: Mesh, arguments: Any, shapes: Any) -> list[NamedSharding]:
        return _of_results(mesh, shapes, _split_axes(mesh, dict(zip(names, arguments, strict=True)), splits))

    def _of_results(mesh: Mesh, shapes: Any, axes: Axes) -> list[NamedSharding]:
        rows = Split(TOKENS, 0)  # of pre_activations: as many for each token
        return [
            _sharding(mesh, len(shape.shape), rows if name == "pre_activations" else splits[name], axes)
            for name, shape in zip(results, shapes, strict=True)
        ]

    split = custom_partitioning(function)
    split.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=functools.partial(_rule, [splits[name] for name in names], [splits[name] for name in results]),
    )
    return split(jnp.asarray(fingerprint(content, repr((tree, results)))), *leaves)


def _sharding_of_whole_weights(arguments: dict[str, Any], splits: dict[str, Split | None]) -> Any:
    """The replicated sharding of weights over those axes of a mesh that a jax.shard_map around the call leaves Auto.

    JAX does not say there which axes these are. Tokens that they split are gathered.

    Raises:
      ValueError: weights are split.
    """
    for name, argument in arguments.items():
        split = splits[name]
        if split is not None and split.kind == EXPERTS and not argument.sharding.is_fully_replicated:
            raise ValueError(
                f"{name} {argument.shape} is split over an Auto axis of the mesh inside a jax.shard_map over others; "
                "name that axis, as in jmoe.moe(..., mesh_axes=jmoe.MeshAxes(experts=...)), or make it explicit"
            )
    return arguments["down"].sharding


def _names_of_operands(tree: Any) -> Names:
    """The name of each leaf of (call, kept, dy)."""
    call, kept, dy = jax.tree.unflatten(tree, range(tree.num_leaves))
    named = buffers_of(call) | ({} if dy is None else {"dy": dy})
    if kept is not None:
        routing = kept.routing and {"kept_experts": kept.routing.experts, "kept_weights": kept.routing.weights}
        named |= {**(routing or {}), "pre_activations": kept.pre_activations}
    places = {place: name for name, place in named.items()}
    return tuple(places[place] for place in range(tree.num_leaves))


def _from_its_first_expert(call: Call, axes: Names) -> Call:
    """What a device has of a call whose experts these mesh axes split, with the offset of its experts."""
    if not axes:
        return call
    first = lax.axis_index(axes).astype(jnp.int32) * call.experts.down.shape[-3]
    before = jnp.zeros(1, jnp.int32) if call.expert_offset is None else call.expert_offset
    return dataclasses.replace(call, expert_offset=before + first)


def _gathered(array: jax.Array, split: Split | None, axes: Axes) -> jax.Array:
    """Tokens of all devices that have a part of the same tokens' experts."""
    if split is None or split.kind != TOKENS or not axes.both:
        return array
    return lax.all_gather(array, axes.both, axis=split.axis, tiled=True)


def _summed(array: jax.Array, name: str, split: Split | None, axes: Axes) -> jax.Array:
    """A device's part of a result: summed over the axes that split what it is a sum over, and of its own tokens."""
    assert split is not None
    if split.kind == EXPERTS:
        over = axes.without_both(TOKENS)
        return lax.psum(array, over) if over else array
    if name in ("experts", "weights"):  # the choice of experts: a sum over nothing
        if not axes.both:
            return array
        own = array.shape[0] // lax.axis_size(axes.both)
        return lax.dynamic_slice_in_dim(array, lax.axis_index(axes.both) * own, own)
    if axes.both:
        array = lax.psum_scatter(array, axes.both, scatter_dimension=split.axis, tiled=True)
    over = axes.without_both(EXPERTS)
    return lax.psum(array, over) if over else array


def _sharding(mesh: Mesh, rank: int, split: Split | None, axes: Axes) -> NamedSharding:
    entries: list[Any] = [None] * rank
    if split is not None:
        entries[split.axis] = getattr(axes, split.kind) or None
    return NamedSharding(mesh, P(*entries))


def _rule(operands: list[Split | None], results: list[Split | None], mesh: Mesh, types: Any, result_types: Any) -> str:
    """Which axes of operands and results are split alike, in Shardy's notation."""

    def factors(prefix: str, splits: list[Split | None], types: Any) -> str:
        arrays = []
        for i, (split, type_) in enumerate(zip(splits, types, strict=True)):
            axes = [f"{prefix}{i}_{axis}" for axis in range(type_.rank)]
            if split is not None:
                axes[split.axis] = split.kind
            arrays.append(" ".join(axes))
        return ", ".join(arrays)

    return f"{factors('in', operands, types)} -> {factors('out', results, result_types)}"


def _split_axes(mesh: Mesh, arguments: dict[str, Any], splits: dict[str, Split | None]) -> Axes:
    """The mesh axes that split x along tokens, if they do evenly, and the weights along experts.

    Raises:
      ValueError: weights are split along another axis, unevenly, or some over other mesh axes than others.
    """
    found: dict[str, Names] = {TOKENS: (), EXPERTS: ()}
    for name, argument in arguments.items():
        split = splits[name]
        if split is None or (split.kind == TOKENS and name != "x"):
            continue
        if (spec := getattr(argument.sharding, "spec", None)) is None:
            if split.kind == EXPERTS and not argument.sharding.is_fully_replicated:
                raise ValueError(f"{name} {argument.shape} is split, but over no mesh that jmoe.moe can see")
            continue
        entries = {axis: names_of((entry,)) for axis, entry in enumerate(spec) if entry is not None}
        names = entries.pop(split.axis, ())
        if split.kind == EXPERTS:
            for axis, others in entries.items():
                raise ValueError(wrong_axis(name, argument.shape, others, axis, split.axis))
        size, parts = argument.shape[split.axis], _size(mesh, names)
        if size % parts:
            if split.kind == EXPERTS:
                raise ValueError(uneven(f"{size} experts", size, names, parts, mesh.size))
            continue
        if names and found[split.kind] not in ((), names):
            raise ValueError(
                "experts and LoRA must be split along experts over the same mesh axes, "
                f"got {name} over {names} and others over {found[split.kind]}"
            )
        found[split.kind] = found[split.kind] or names
    return Axes(found[TOKENS], found[EXPERTS])


def _size(mesh: Mesh, names: Names) -> int:
    return math.prod(mesh.shape[name] for name in names)
