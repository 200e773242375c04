"""The rule of jax.vmap for the layer's primitive."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def batch_launches(
    bind: Callable[..., list[jax.Array]], args: Sequence[jax.Array], dims: Sequence[Any], *, tree: Any, **params: Any
) -> tuple[list[jax.Array], list[int]]:
    """Results with a leading axis for the batch: by one call of more tokens where these alone are batched and y alone
    is wanted, by one call after another else.

    bind: of the primitive, whose operands are a pytree's leaves, its parameter `tree`: (call, ...).
    """
    is_batched = [dim is not None for dim in dims]
    moved = [
        jnp.moveaxis(arg, dim, 0) if moves else arg for arg, dim, moves in zip(args, dims, is_batched, strict=True)
    ]
    size = next(arg.shape[0] for arg, moves in zip(moved, is_batched, strict=True) if moves)
    call, *others = tree.unflatten(is_batched)
    held = dataclasses.replace(call, tokens=None)
    if params["results"] == ("y",) and not any(jax.tree.leaves((held, others))):
        arrays, *nothing = tree.unflatten(moved)
        merge = functools.partial(merge_batch, size)
        longer = dataclasses.replace(arrays, tokens=jax.tree.map(merge, arrays.tokens, call.tokens))
        (y,) = bind(*jax.tree.leaves((longer, *nothing)), tree=tree, **params)
        return [y.reshape(size, arrays.tokens.x.shape[-2], y.shape[1])], [0]

    def one(batched: list[jax.Array]) -> list[jax.Array]:
        rest = iter(batched)
        operands = [next(rest) if moves else arg for arg, moves in zip(moved, is_batched, strict=True)]
        return bind(*operands, tree=tree, **params)

    results = lax.map(one, [arg for arg, moves in zip(moved, is_batched, strict=True) if moves])
    return results, [0] * len(results)


def merge_batch(size: int, array: jax.Array, is_batched: bool) -> jax.Array:
    """[B, T, ...] -> [B * T, ...], after a broadcast from [T, ...] if the array has no batch axis."""
    if not is_batched:
        array = jnp.broadcast_to(array, (size, *array.shape))
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])
