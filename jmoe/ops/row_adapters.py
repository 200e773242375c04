"""Rows that have adapters of their own, by plain operations."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32


def by_present_adapter(
    ids: Int32[Array, " T"], adapters: int, of_one: Callable[[Int32[Array, ""]], Array], result: Float[Array, "T N"]
) -> Float[Array, "T N"]:
    """The result with of_one(adapter) [T, N] in the rows that have the adapter; others' are selected away.

    Takes as long as there are adapters among the rows, however many are loaded. It has no gradient.

    ids: each row's adapter; of one that there is not the result stays as it is.
    """

    def following(adapter: Array) -> Array:
        return jnp.min(jnp.where(ids > adapter, ids, adapters), initial=adapters)

    def is_there(carry: tuple[Array, Array]) -> Bool[Array, ""]:
        return carry[0] < adapters

    def select(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        adapter, result = carry
        mine = (ids == adapter)[:, None]
        return following(adapter), jnp.where(mine, of_one(adapter).astype(result.dtype), result)

    return lax.while_loop(is_there, select, (following(jnp.int32(-1)), result))[1]
