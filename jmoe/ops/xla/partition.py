"""The layer on arrays that a mesh splits: by tokens, by experts, or by both, without a gather of weights.

XLA's partitioner would gather a stack of experts before a loop over it. It asks this instead: each device computes the
layer of its own tokens and experts, and the results are summed over the axes that split the experts (gradients in
weights, over those that split the tokens). Other splits, along rows or columns of weights, are gathered.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmoe.ops.buffers import Buffers

TOKENS, EXPERTS = "tokens", "experts"

TOKEN_NAMES = frozenset({"x", "experts", "weights", "adapter_ids", "dy"})
FACTOR_NAMES = frozenset(f"{projection}_{part}" for projection in ("gate_up", "down") for part in ("a", "b"))
WHOLE_NAMES = frozenset({"gate_up_scale", "down_scale", "expert_offset"})

type Compute = Callable[[Buffers], list[jax.Array]]


def what_splits(name: str) -> tuple[str, int] | None:
    """(tokens or experts, the axis of them) of a call's array; None if it has neither."""
    if name in TOKEN_NAMES:
        return TOKENS, 0
    if name in FACTOR_NAMES:
        return EXPERTS, 1
    return None if name in WHOLE_NAMES else (EXPERTS, 0)


def partitioned(compute: Compute, results: Sequence[str]) -> Compute:
    """The function, whose results are like the call's arrays of these names, with a rule for XLA's partitioner.

    Each result is a sum over experts if it is of tokens, and a sum over tokens if it is of experts.
    """

    def call(buffers: Buffers) -> list[jax.Array]:
        names = tuple(buffers)
        function = custom_partitioning(lambda *arrays: compute(dict(zip(names, arrays, strict=True))))
        function.def_partition(
            partition=functools.partial(_partition, compute, names, tuple(results)),
            infer_sharding_from_operands=functools.partial(_infer, names, tuple(results)),
            sharding_rule=functools.partial(_rule, names, tuple(results)),
        )
        return function(*buffers.values())

    return call


def _partition(
    compute: Compute, names: tuple[str, ...], results: tuple[str, ...], mesh: Mesh, arguments: Any, shapes: Any
) -> tuple[Mesh, Callable[..., list[jax.Array]], list[NamedSharding], tuple[NamedSharding, ...]]:
    """As custom_partitioning wants it: (mesh, what a device runs, shardings of results, of arguments)."""
    axes = _split_axes(mesh, dict(zip(names, arguments, strict=True)))
    ranks = {name: len(argument.shape) for name, argument in zip(names, arguments, strict=True)}

    def own(*arrays: jax.Array) -> list[jax.Array]:
        buffers = dict(zip(names, arrays, strict=True))
        if axes[EXPERTS]:
            first = lax.axis_index(axes[EXPERTS]) * buffers["down"].shape[0]
            before = buffers.get("expert_offset", jnp.zeros(1, jnp.int32))
            buffers["expert_offset"] = before + first.astype(jnp.int32)
        sums = []
        for name, result in zip(results, compute(buffers), strict=True):
            summed = axes[EXPERTS if _kind(name) == TOKENS else TOKENS]
            sums.append(lax.psum(result, summed) if summed else result)
        return sums

    given = tuple(NamedSharding(mesh, _spec(name, ranks[name], axes)) for name in names)
    made = [
        NamedSharding(mesh, _spec(name, len(shape.shape), axes))
        for name, shape in zip(results, jax.tree.leaves(shapes), strict=True)
    ]
    return mesh, own, made, given


def _infer(
    names: tuple[str, ...], results: tuple[str, ...], mesh: Mesh, arguments: Any, shapes: Any
) -> list[NamedSharding]:
    axes = _split_axes(mesh, dict(zip(names, arguments, strict=True)))
    return [
        NamedSharding(mesh, _spec(name, len(shape.shape), axes))
        for name, shape in zip(results, jax.tree.leaves(shapes), strict=True)
    ]


def _rule(names: tuple[str, ...], results: tuple[str, ...], mesh: Mesh, types: Any, result_types: Any) -> str:
    """Which axes of operands and results are split alike, in Shardy's notation."""

    def factors(prefix: str, names: tuple[str, ...], types: Any) -> str:
        operands = []
        for i, (name, type_) in enumerate(zip(names, types, strict=True)):
            axes = [f"{prefix}{i}_{axis}" for axis in range(type_.rank)]
            if split := what_splits(name):
                axes[split[1]] = split[0]
            operands.append(" ".join(axes))
        return ", ".join(operands)

    return f"{factors('in', names, types)} -> {factors('out', results, result_types)}"


def _kind(name: str) -> str | None:
    split = what_splits(name)
    return split and split[0]


def _spec(name: str, rank: int, axes: dict[str, tuple[str, ...]]) -> P:
    split = what_splits(name)
    return P(*(axes[split[0]] or None if split and axis == split[1] else None for axis in range(rank)))


def _split_axes(mesh: Mesh, arguments: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The mesh axes that split experts, and of the others those that split tokens, if they do evenly."""
    chosen: dict[str, tuple[str, ...]] = {}
    for kind, name in ((EXPERTS, "down"), (TOKENS, "x")):
        argument = arguments[name]
        spec = getattr(argument.sharding, "spec", P())
        first = spec[0] if len(spec) else None
        axes = first if isinstance(first, tuple) else (first,) if first is not None else ()
        axes = tuple(axis for axis in axes if axis not in chosen.get(EXPERTS, ()))
        even = argument.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0
        chosen[kind] = axes if even else ()
    return chosen
