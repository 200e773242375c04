"""Rules for jax.vmap."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jmoe.ops.buffers import Buffers, Options
from jmoe.ops.launch.layer import moe_p

TOKEN_BUFFERS = frozenset({"x", "router_logits", "adapter_ids", "experts", "weights"})
"""Buffers whose leading axis is the token, so that a batch of them is a longer one."""


@functools.cache
def moe_of_batches(options: Options) -> Callable[[Buffers], jax.Array]:
    """moe_p with a rule for vmap: more tokens where only tokens are batched, one launch after another else."""

    @custom_vmap
    def call(buffers: Buffers) -> jax.Array:
        return moe_p.bind(*buffers.values(), names=tuple(buffers), options=options)

    @call.def_vmap
    def batch(axis_size: int, in_batched: list[dict[str, bool]], buffers: Buffers) -> tuple[jax.Array, bool]:
        batched = {name for name, is_batched in in_batched[0].items() if is_batched}
        if batched <= TOKEN_BUFFERS:
            merged = {
                name: merge_batch(array, axis_size, name in batched) if name in TOKEN_BUFFERS else array
                for name, array in buffers.items()
            }
            y = call(merged)
            tokens = buffers["x"].shape[-2]
            return y.reshape(axis_size, tokens, y.shape[1]), True
        moving = {name: buffers[name] for name in batched}
        return lax.map(lambda one: call({**buffers, **one}), moving), True

    return call


def merge_batch(array: jax.Array, axis_size: int, is_batched: bool) -> jax.Array:
    """[B, T, ...] -> [B * T, ...], after a broadcast from [T, ...] if the array has no batch axis."""
    if not is_batched:
        array = jnp.broadcast_to(array, (axis_size, *array.shape))
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def one_after_another(function: Callable[[Buffers], Any]) -> Callable[[Buffers], Any]:
    """The function of arrays with a rule for vmap that calls it for each element of the batch in turn."""

    @custom_vmap
    def call(buffers: Buffers) -> Any:
        return function(buffers)

    @call.def_vmap
    def batch(axis_size: int, in_batched: list[dict[str, bool]], buffers: Buffers) -> tuple[Any, Any]:
        moving = {name: buffers[name] for name, is_batched in in_batched[0].items() if is_batched}
        out = lax.map(lambda one: call({**buffers, **one}), moving)
        return out, jax.tree.map(lambda _: True, out)

    return call
