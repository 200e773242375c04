"""The XLA backend in float32, forward and backward, beside the same formulas in float64 over all experts at once."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.ops.mxfp4 import dequantize
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from jmoe.ops.xla.columns import decode_columns

RELATIVE = 1e-6
"""float32 sums of at most 96 terms, in another order."""


def moe(layer: Layer, routing_weights: jax.Array, chosen: jax.Array) -> jax.Array:
    routing = jmoe.Routing(chosen, routing_weights)
    given = {"lora": layer.lora, "adapter_ids": layer.adapter_ids, "routing": routing}
    return jmoe.moe(layer.x, None, layer.experts, top_k=chosen.shape[1], backend="xla", **given)


def in_float64(layer: Layer, routing_weights: jax.Array, chosen: jax.Array) -> jax.Array:
    """Each token through every expert, weighted by its routing, 0 for experts that it did not choose."""

    def project(
        x: jax.Array, weight: jax.Array, bias: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array
    ) -> jax.Array:
        z = jnp.einsum("etk,enk->etn", x, weight) + bias[:, None]
        every = jnp.einsum("a,etk,aerk,aenr->aetn", scale, x, a, b)
        mine = layer.adapter_ids[None] == jnp.arange(scale.size, dtype=layer.adapter_ids.dtype)[:, None]
        return z + jnp.sum(jnp.where(mine[:, None, :, None], every, 0), axis=0)

    experts, lora = layer.experts, layer.lora
    x = jnp.broadcast_to(layer.x, (experts.down.shape[0], *layer.x.shape))
    z = project(x, experts.gate_up, experts.gate_up_bias, lora.gate_up_a, lora.gate_up_b, lora.gate_up_scale)
    gate, up = jnp.minimum(z[..., 0::2], 7), jnp.clip(z[..., 1::2], -7, 7)
    h = gate / (1 + jnp.exp(-1.702 * gate)) * (up + 1)
    y = project(h, experts.down, experts.down_bias, lora.down_a, lora.down_b, lora.down_scale)
    of_experts = jax.nn.one_hot(chosen, x.shape[0], dtype=y.dtype)
    return jnp.einsum("tke,tk,eth->th", of_experts, routing_weights, y)


@pytest.mark.parametrize("mxfp4", [True, False])
def test_forward_and_gradients_in_float32_are_those_of_float64(mxfp4: bool) -> None:
    shape = LayerShape(40, hidden=64, intermediate=96, experts=5, top_k=2, adapters=2, rank=3, mixed=True, mxfp4=mxfp4)
    given = random_layer(shape)
    routing = jmoe.route(given.router_logits, 2)
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    layer = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if is_float(leaf) else leaf, given)
    dense = layer.experts
    if mxfp4:
        weights = {name: dequantize(getattr(dense, name), jnp.float32) for name in ("gate_up", "down")}
        dense = dataclasses.replace(dense, **weights)
    dy = np.random.default_rng(0).normal(size=layer.x.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(function: Callable[..., jax.Array], primals: tuple, dy: jax.Array) -> dict[str, jax.Array]:
        leaves, tree = jax.tree.flatten(primals)
        floats = {i: leaf for i, leaf in enumerate(leaves) if is_float(leaf)}

        def of_floats(floats: dict[int, jax.Array]) -> jax.Array:
            return function(*tree.unflatten([floats.get(i, leaf) for i, leaf in enumerate(leaves)]), routing.experts)

        y, pull_back = jax.vjp(of_floats, floats)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(primals)]
        (gradients,) = pull_back(dy)
        return {"y": y} | {paths[i]: gradient for i, gradient in gradients.items()}

    got = value_and_gradients(moe, (layer, routing.weights), dy.astype(np.float32))
    with jax.enable_x64(True):
        primals = dataclasses.replace(layer, experts=dense), routing.weights
        primals = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if is_float(leaf) else leaf, primals)
        want = {name: np.asarray(array) for name, array in value_and_gradients(in_float64, primals, dy).items()}
    compared = {name for name in got if not name.endswith(("_scale", "router_logits"))}
    assert len(compared) == (9 if mxfp4 else 11)
    for name in compared:
        assert np.linalg.norm(got[name] - want[name]) <= RELATIVE * np.linalg.norm(want[name]), name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_decoded_columns_are_dequantized_weights(dtype: jnp.dtype) -> None:
    codes = jnp.arange(16, dtype=jnp.uint8)
    scales = jnp.array([2, 3, 127, 251, 252, 255], jnp.uint8)
    weight = jmoe.Mxfp4(jnp.tile(codes | codes[::-1] << 4, (6, 1, 1)), scales[:, None])
    even, odd = decode_columns(weight, dtype)
    want = dequantize(jax.tree.map(lambda leaf: leaf[None], weight), dtype)[0]
    assert even.dtype == odd.dtype == dtype
    np.testing.assert_array_equal(np.float32(jnp.stack([even, odd], axis=-1).reshape(6, 32)), np.float32(want))
