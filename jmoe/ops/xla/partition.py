"""The layer on arrays that a mesh splits: by tokens, by experts, or by both, without a gather of weights.

XLA's partitioner would gather a stack of experts before a loop over it. It asks this instead: each device computes the
layer of its own tokens and experts, and the results are summed over the axes that split the experts (gradients in
weights, over those that split the tokens). Other splits, along rows or columns of weights, are gathered.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmoe.ops.call import Call, buffers_of

TOKENS, EXPERTS = "tokens", "experts"

TOKEN_NAMES = frozenset({"x", "experts", "weights", "adapter_ids", "dy"})
FACTOR_NAMES = frozenset(f"{projection}_{part}" for projection in ("gate_up", "down") for part in ("a", "b"))
WHOLE_NAMES = frozenset({"gate_up_scale", "down_scale", "expert_offset"})

type Compute = Callable[[Call, jax.Array | None], list[jax.Array]]
type Names = tuple[str, ...]


def what_splits(name: str) -> tuple[str, int] | None:
    """(tokens or experts, the axis of them) of a call's array; None if it has neither."""
    if name in TOKEN_NAMES:
        return TOKENS, 0
    if name in FACTOR_NAMES:
        return EXPERTS, 1
    return None if name in WHOLE_NAMES else (EXPERTS, 0)


def partitioned(compute: Compute, results: Names, call: Call, dy: jax.Array | None) -> list[jax.Array]:
    """compute(call, dy), whose results are like the call's arrays of these names, with a rule for XLA's partitioner.

    Each result is a sum over experts if it is of tokens, and a sum over tokens if it is of experts.
    """
    leaves = jax.tree.leaves((call, dy))
    tree: Any = jax.tree.structure((call, dy))
    of_call, of_dy = tree.unflatten(range(len(leaves)))
    named = buffers_of(of_call) | ({} if dy is None else {"dy": of_dy})
    names = tuple(sorted(named, key=lambda name: named[name]))

    def function(*leaves: jax.Array) -> list[jax.Array]:
        return compute(*tree.unflatten(leaves))

    def partition(mesh: Mesh, arguments: Any, shapes: Any) -> tuple[Any, ...]:
        axes = _split_axes(mesh, dict(zip(names, arguments, strict=True)))

        def on_device(*leaves: jax.Array) -> list[jax.Array]:
            call, dy = tree.unflatten(leaves)
            arrays = compute(_from_its_first_expert(call, axes[EXPERTS]), dy)
            return [_summed(array, name, axes) for name, array in zip(results, arrays, strict=True)]

        return mesh, on_device, _shardings(mesh, results, shapes, axes), tuple(_shardings(mesh, names, arguments, axes))

    def infer(mesh: Mesh, arguments: Any, shapes: Any) -> list[NamedSharding]:
        return _shardings(mesh, results, shapes, _split_axes(mesh, dict(zip(names, arguments, strict=True))))

    split = custom_partitioning(function)
    split.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=functools.partial(_rule, names, results),
    )
    return split(*leaves)


def _from_its_first_expert(call: Call, axes: Names) -> Call:
    """What a device has of a call whose experts these mesh axes split, with the offset of its experts."""
    if not axes:
        return call
    first = lax.axis_index(axes) * call.experts.down.shape[0]
    before = jnp.zeros(1, jnp.int32) if call.expert_offset is None else call.expert_offset
    return dataclasses.replace(call, expert_offset=before + first.astype(jnp.int32))


def _summed(array: jax.Array, name: str, axes: dict[str, Names]) -> jax.Array:
    """A device's part of a result, summed over the axes that split what it is a sum over."""
    split = what_splits(name)
    summed = axes[EXPERTS if split and split[0] == TOKENS else TOKENS]
    return lax.psum(array, summed) if summed else array


def _shardings(mesh: Mesh, names: Names, arrays: Any, axes: dict[str, Names]) -> list[NamedSharding]:
    shardings = []
    for name, array in zip(names, jax.tree.leaves(arrays), strict=True):
        parts: list[Any] = [None] * len(array.shape)
        if split := what_splits(name):
            parts[split[1]] = axes[split[0]] or None
        shardings.append(NamedSharding(mesh, P(*parts)))
    return shardings


def _rule(names: Names, results: Names, mesh: Mesh, types: Any, result_types: Any) -> str:
    """Which axes of operands and results are split alike, in Shardy's notation."""

    def factors(prefix: str, names: Names, types: Any) -> str:
        operands = []
        for i, (name, type_) in enumerate(zip(names, types, strict=True)):
            axes = [f"{prefix}{i}_{axis}" for axis in range(type_.rank)]
            if split := what_splits(name):
                axes[split[1]] = split[0]
            operands.append(" ".join(axes))
        return ", ".join(operands)

    return f"{factors('in', names, types)} -> {factors('out', results, result_types)}"


def _split_axes(mesh: Mesh, arguments: dict[str, Any]) -> dict[str, Names]:
    """The mesh axes that split experts, and of the others those that split tokens, if they do evenly."""
    chosen: dict[str, Names] = {}
    for kind, name in ((EXPERTS, "down"), (TOKENS, "x")):
        argument = arguments[name]
        spec = getattr(argument.sharding, "spec", P())
        first = spec[0] if len(spec) else None
        axes = first if isinstance(first, tuple) else (first,) if first is not None else ()
        axes = tuple(axis for axis in axes if axis not in chosen.get(EXPERTS, ()))
        even = argument.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0
        chosen[kind] = axes if even else ()
    return chosen
