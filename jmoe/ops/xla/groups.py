"""Pairs of a token and an expert, sorted by expert: the rows that grouped products take, a tile at a time."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

FEWEST_ROWS = 8
"""Rows of the smallest tile. A product of one bfloat16 row takes a CPU longer than one of eight."""

MOST_ROWS = 256
"""Rows of the largest tile: with more, a product is no faster a row."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("pairs", "places", "held", "starts", "active", "active_count"),
    meta_fields=("rows",),
)
@dataclasses.dataclass(frozen=True)
class Groups:
    """P = tokens * top_k pairs in the order of their experts, and within an expert of their adapters; a pytree.

    pairs: the pair (token * top_k + choice) at each place; those of no expert here come last, then a tile of padding.
    places: the inverse: the place of each pair.
    held: whether the pair's expert is here.
    starts: the first place of each expert, and the one after the last expert's pairs.
    active: the experts that have pairs, ascending, then the others; active_count says how many have.
    rows: the rows of a tile; static.
    """

    pairs: Int32[Array, " P+rows"]
    places: Int32[Array, "T k"]
    held: Bool[Array, "T k"]
    starts: Int32[Array, " E+1"]
    active: Int32[Array, " E"]
    active_count: Int32[Array, ""]
    rows: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=("first", "pairs", "tokens", "is_own"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Tile:
    """Consecutive places, the first of which belong to one expert; a pytree.

    first: the first place.
    pairs, tokens: the pair at each, and its token.
    is_own: whether the place is the expert's; from the first that is not on none is.
    """

    first: Int32[Array, ""]
    pairs: Int32[Array, " rows"]
    tokens: Int32[Array, " rows"]
    is_own: Bool[Array, " rows"]


def group_pairs(
    experts: Int32[Array, "T k"],
    expert_offset: Int32[Array, ""] | int,
    count: int,
    adapter_ids: Int32[Array, " T"] | None,
    adapters: int,
) -> Groups:
    """Sorts the pairs of experts [expert_offset, expert_offset + count)."""
    tokens, top_k = experts.shape
    local = experts - expert_offset
    held = (local >= 0) & (local < count)
    local = jnp.where(held, local, count)
    key = local
    if adapter_ids is not None:
        key = local * (adapters + 1) + jnp.clip(adapter_ids, -1, adapters - 1)[:, None] + 1
    pairs = jnp.argsort(key.reshape(-1), stable=True).astype(jnp.int32)
    places = jnp.zeros_like(pairs).at[pairs].set(jnp.arange(pairs.size, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.zeros_like(pairs, shape=(count + 1,)).at[local.reshape(-1)].add(1)[:count]
    starts = jnp.pad(jnp.cumsum(sizes), (1, 0))
    active = jnp.argsort(sizes == 0, stable=True).astype(jnp.int32)
    rows = tile_rows(pairs.size, count)
    padded = jnp.pad(pairs, (0, rows))
    return Groups(padded, places.reshape(tokens, top_k), held, starts, active, jnp.sum(sizes > 0), rows)


def tile_rows(pairs: int, experts: int) -> int:
    """One and a half times the mean number of pairs an expert, in steps of eight, within what products take well.

    Where experts are chosen evenly almost all of them then have one tile.
    """
    return min(max(-(-3 * pairs // (16 * experts)) * 8, FEWEST_ROWS), MOST_ROWS)


def for_each_expert[C](groups: Groups, body: Callable[[Int32[Array, ""], C], C], carry: C) -> C:
    """body(expert, carry) for each expert that has pairs, in ascending order."""
    return lax.fori_loop(0, groups.active_count, lambda i, carry: body(groups.active[i], carry), carry)


def for_each_tile[C](groups: Groups, expert: Int32[Array, ""], body: Callable[[Tile, C], C], carry: C) -> C:
    """body(tile, carry) for each tile of an expert's pairs, in ascending order."""
    start, stop = groups.starts[expert], groups.starts[expert + 1]
    top_k = groups.places.shape[1]

    def one_tile(i: Int32[Array, ""], carry: C) -> C:
        first = start + i * groups.rows
        pairs = lax.dynamic_slice_in_dim(groups.pairs, first, groups.rows)
        return body(Tile(first, pairs, pairs // top_k, first + jnp.arange(groups.rows) < stop), carry)

    return lax.fori_loop(0, -(-(stop - start) // groups.rows), one_tile, carry)


def store_tile(stored: Float[Array, "P ..."], tile: Tile, rows: Float[Array, "rows ..."]) -> Float[Array, "P ..."]:
    """`stored` with a tile's rows at its places. The next expert's tile overwrites those that are not its own."""
    return lax.dynamic_update_slice_in_dim(stored, rows.astype(stored.dtype), tile.first, axis=0)


def empty_places(groups: Groups, like: jax.Array, dtype: DTypeLike, width: int) -> Float[Array, "P+rows N"]:
    """Room for a row of every place and a tile of padding, zeros; sharded in shard_map as `like`."""
    return jnp.zeros_like(like, dtype, shape=(groups.pairs.size, width))


def rows_of_pairs(groups: Groups, stored: Float[Array, "P ..."]) -> Float[Array, "T k ..."]:
    """The rows by pair in float32, 0 for pairs whose expert is not here."""
    rows = stored[groups.places].astype(jnp.float32)
    return jnp.where(groups.held.reshape(groups.held.shape + (1,) * (rows.ndim - 2)), rows, 0)
