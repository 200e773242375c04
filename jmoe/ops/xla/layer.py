"""The layer and its gradient as loops over the experts that tokens chose, and within over tiles of their rows.

Products take operands in x's dtype and sum in float32; bias, LoRA's sum, the activation and gate weights are float32;
what the kernels store between launches (LoRA's shrunk rows, activations, each expert's output) is rounded to x's dtype
here too. The backward pass computes everything again from the call's arrays.
"""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.ops.call import Call, buffers_of
from jmoe.ops.experts import adapter_count
from jmoe.ops.routing import Routing
from jmoe.ops.xla.adapters import down_of, gate_up_of
from jmoe.ops.xla.columns import unpacked
from jmoe.ops.xla.groups import (
    Groups,
    Tile,
    empty_places,
    for_each_expert,
    for_each_tile,
    group_pairs,
    rows_of_pairs,
    store_tile,
)
from jmoe.ops.xla.projection import Projection, ProjectionGradient, add_gradient
from jmoe.ops.xla.swiglu import swiglu
from jmoe.triton_src.activation import SwiGLU


def forward(activation: SwiGLU, call: Call) -> Float[Array, "T H"]:
    """y[t] = sum over t's pairs of weight * expert(x[t]), in float32, so that those of shards can be added.

    Pairs of experts outside [expert_offset, expert_offset + E) add nothing. The weights of an expert without pairs are
    not read, so that neither their time nor a NaN in them counts.
    """
    if call.tokens.x.shape[0] == 0:
        return call.tokens.x.astype(jnp.float32)
    call, known = _only_known_adapters(call)
    groups, x = _group(call), call.tokens.x

    def one_expert(expert: Int32[Array, ""], outputs: Float[Array, "P H"]) -> Float[Array, "P H"]:
        gate_up, down = _projections(call, expert)

        def one_tile(tile: Tile, outputs: Float[Array, "P H"]) -> Float[Array, "P H"]:
            x, gate, ids = _rows(call, tile)
            h = swiglu(gate_up(x, ids), activation).astype(x.dtype)
            return store_tile(outputs, tile, gate * down(h, ids))

        return for_each_tile(groups, expert, one_tile, outputs)

    outputs = for_each_expert(groups, one_expert, empty_places(groups, x, x.dtype, x.shape[1]))
    y = jnp.sum(rows_of_pairs(groups, outputs), axis=1)
    return y if known is None else jnp.where(known[:, None], y, jnp.nan)


def backward(activation: SwiGLU, call: Call, wanted: Collection[str], dy: Float[Array, "T H"]) -> dict[str, jax.Array]:
    """The gradients of these of the call's arrays, in their dtypes but for x's, which is float32 as y is.

    Args:
      wanted: any of "x", "weights" (the routing's) and, for gate_up and down alike, "gate_up" (floating weights alone),
        "gate_up_bias", "gate_up_a" and "gate_up_b".
    """
    buffers = buffers_of(call)
    gradients = {name: jnp.zeros_like(buffers[name]) for name in wanted}
    if call.tokens.x.shape[0] == 0:
        return gradients
    call, known = _only_known_adapters(call)
    groups, x = _group(call), call.tokens.x
    if known is not None:
        dy = jnp.where(known[:, None], dy, 0)
    stored = {name: gradients.pop(name) for name in ("x", "weights") if name in wanted}
    if "x" in stored:
        stored["x"] = empty_places(groups, x, x.dtype, x.shape[1])
    if "weights" in stored:
        stored["weights"] = empty_places(groups, x, jnp.float32, 1)

    def one_expert(expert: Int32[Array, ""], carry: tuple[dict, dict]) -> tuple[dict, dict]:
        stored, gradients = carry
        gate_up, down = _projections(call, expert)

        def one_tile(
            tile: Tile, carry: tuple[dict, ProjectionGradient, ProjectionGradient]
        ) -> tuple[dict, ProjectionGradient, ProjectionGradient]:
            stored, of_gate_up, of_down = carry
            x, gate, ids = _rows(call, tile)
            h, pull_back = jax.vjp(lambda z: swiglu(z, activation), gate_up(x, ids))
            dy_rows = dy[tile.tokens]
            # Before the gate's weight multiplies it, dh also tells the weight's gradient, without down's results.
            dh, of_down = add_gradient(down, of_down, h.astype(x.dtype), dy_rows, gate, ids, tile.is_own)
            (dz,) = pull_back(gate * dh)
            dx, of_gate_up = add_gradient(gate_up, of_gate_up, x, dz, 1.0, ids, tile.is_own)
            d_gate = jnp.sum(dh * h, axis=1, keepdims=True)
            if down.bias is not None:
                d_gate += jnp.sum(dy_rows.astype(jnp.float32) * down.bias.astype(jnp.float32), axis=1, keepdims=True)
            rows = {"x": dx, "weights": d_gate}
            return {n: store_tile(array, tile, rows[n]) for n, array in stored.items()}, of_gate_up, of_down

        sums = (_zero_gradient("gate_up", gradients, expert), _zero_gradient("down", gradients, expert))
        stored, *of_both = for_each_tile(groups, expert, one_tile, (stored, *sums))
        for projection, of_projection in zip(("gate_up", "down"), of_both, strict=True):
            gradients = _set_gradient(gradients, projection, expert, of_projection)
        return stored, gradients

    stored, gradients = for_each_expert(groups, one_expert, (stored, gradients))
    if "x" in stored:
        gradients["x"] = jnp.sum(rows_of_pairs(groups, stored["x"]), axis=1)
    if "weights" in stored:
        gradients["weights"] = rows_of_pairs(groups, stored["weights"])[..., 0]
    return gradients


def _only_known_adapters(call: Call) -> tuple[Call, jax.Array | None]:
    """(the call, which tokens have a known adapter or none): others have no adapter and an x of 0.

    Such a token of an earlier layer is NaN, which times its gradient of 0 would be NaN in all of LoRA's.
    """
    tokens = call.tokens
    if call.lora is None:
        return call, None
    if tokens.adapter_ids is None:
        tokens = dataclasses.replace(tokens, adapter_ids=jnp.zeros_like(routing_of(call).experts[:, 0]))
        return dataclasses.replace(call, tokens=tokens), None
    ids = tokens.adapter_ids
    known = (ids >= -1) & (ids < adapter_count(call.lora))
    x, ids = jnp.where(known[:, None], tokens.x, 0), jnp.where(known, ids, -1)
    return dataclasses.replace(call, tokens=dataclasses.replace(tokens, x=x, adapter_ids=ids)), known


def routing_of(call: Call) -> Routing:
    """The routing, which a call has here."""
    assert call.tokens.routing is not None
    return call.tokens.routing


def _group(call: Call) -> Groups:
    adapters = 0 if call.lora is None else adapter_count(call.lora)
    offset = 0 if call.expert_offset is None else call.expert_offset[0]
    return group_pairs(routing_of(call).experts, offset, call.experts.down.shape[0], call.tokens.adapter_ids, adapters)


def _projections(call: Call, expert: Int32[Array, ""]) -> tuple[Projection, Projection]:
    """(gate_up, down) of one expert."""
    own = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, expert, keepdims=False), call.experts)
    lora = jax.tree.map(
        lambda leaf: leaf if leaf.ndim == 1 else lax.dynamic_index_in_dim(leaf, expert, axis=1, keepdims=False),
        call.lora,
    )
    return (
        Projection(unpacked(own.gate_up), own.gate_up_bias, gate_up_of(lora)),
        Projection(unpacked(own.down), own.down_bias, down_of(lora)),
    )


def _rows(
    call: Call, tile: Tile
) -> tuple[Float[Array, "rows H"], Float[Array, "rows 1"], Int32[Array, " rows"] | None]:
    """(x, routing weight, adapter) of each row of a tile; no adapter for rows that are not the expert's."""
    tokens = call.tokens
    ids = None if tokens.adapter_ids is None else jnp.where(tile.is_own, tokens.adapter_ids[tile.tokens], -1)
    return tokens.x[tile.tokens], routing_of(call).weights.reshape(-1)[tile.pairs][:, None], ids


def _zero_gradient(projection: str, gradients: dict[str, jax.Array], expert: Int32[Array, ""]) -> ProjectionGradient:
    """Room in float32 for one expert's part of the gradients that there are."""

    def zero(name: str, axis: int = 0) -> jax.Array | None:
        if name not in gradients:
            return None
        part = lax.dynamic_index_in_dim(gradients[name], expert, axis, keepdims=False)
        return jnp.zeros_like(part, jnp.float32)

    a, b = (zero(f"{projection}_{part}", 1) for part in ("a", "b"))
    return ProjectionGradient(zero(projection), zero(f"{projection}_bias"), (a, b))


def _set_gradient(
    gradients: dict[str, jax.Array], projection: str, expert: Int32[Array, ""], own: ProjectionGradient
) -> dict[str, jax.Array]:
    """The gradients with one expert's part in its place."""
    a, b = own.factors
    parts = {"": (own.weight, 0), "_bias": (own.bias, 0), "_a": (a, 1), "_b": (b, 1)}
    changed = dict(gradients)
    for suffix, (part, axis) in parts.items():
        if part is not None:
            name = projection + suffix
            changed[name] = lax.dynamic_update_index_in_dim(
                gradients[name], part.astype(gradients[name].dtype), expert, axis
            )
    return changed
