"""Experts on two GPUs: each computes its own, by the kernels, and no weight is sent."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jmoe
from jmoe.ops.export import TRITON_CUSTOM_CALL
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from tests.ops.mesh_program import errors, place, sent
from tests.tolerances import BFLOAT16, GRADIENT

pytestmark = pytest.mark.gpu

HOW = ["Auto", "Explicit", "named"]
SHAPE = LayerShape(64, hidden=320, intermediate=352, experts=8, adapters=2, rank=16, mixed=True)


@pytest.fixture(autouse=True)
def _two_gpus() -> None:
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")


def mesh_of(how: str) -> jax.sharding.Mesh:
    kind = AxisType.Explicit if how == "Explicit" else AxisType.Auto
    return jax.make_mesh((2,), ("e",), devices=jax.devices()[:2], axis_types=(kind,))


def layer_of(shape: LayerShape, packed: bool) -> Layer:
    layer = random_layer(shape)
    return dataclasses.replace(layer, experts=jmoe.pack(layer.experts)) if packed else layer


def y(layer: Layer, /, x: jax.Array, lora: jmoe.Lora | None, logits: jax.Array, **options: Any) -> jax.Array:
    return jmoe.moe(x, logits, layer.experts, top_k=4, lora=lora, adapter_ids=layer.adapter_ids, **options)


def forward(layer: Layer, /, **options: Any) -> jax.Array:
    return y(layer, layer.x, layer.lora, layer.router_logits, **options)


def gradient(layer: Layer, /, **options: Any) -> Any:
    def loss(x: jax.Array, lora: jmoe.Lora, logits: jax.Array) -> jax.Array:
        return jnp.sum(y(layer, x, lora, logits, **options).astype(jnp.float32) ** 2)

    return jax.grad(loss, (0, 1, 2))(layer.x, layer.lora, layer.router_logits)


def scan(layer: Layer, /, **options: Any) -> jax.Array:
    step = lambda x, _: (y(layer, x, layer.lora, layer.router_logits, **options), None)  # noqa: E731
    return jax.lax.scan(step, layer.x, length=2)[0]


def vmap(layer: Layer, /, **options: Any) -> jax.Array:
    groups = [a.reshape(4, -1, *a.shape[1:]) for a in (layer.x, layer.router_logits, layer.adapter_ids)]

    def one(x: jax.Array, logits: jax.Array, ids: jax.Array) -> jax.Array:
        return y(dataclasses.replace(layer, adapter_ids=ids), x, layer.lora, logits, **options)

    return jax.vmap(one)(*groups).reshape(layer.x.shape)


@pytest.mark.parametrize("function", [forward, gradient, scan, vmap])
@pytest.mark.parametrize("tokens_split", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_each_gpu_computes_its_own_experts(how: str, packed: bool, tokens_split: bool, function: Any) -> None:
    layer = layer_of(SHAPE, packed)
    axes = jmoe.MeshAxes("e", P("e") if tokens_split else P())
    options = {"mesh_axes": axes} if how == "named" else {}
    placed = place(layer, mesh_of(how), axes, stacked=False)
    compiled = jax.jit(lambda layer: function(layer, **options)).lower(placed).compile()
    program = compiled.as_text()
    assert TRITON_CUSTOM_CALL in program
    weight = SHAPE.experts * SHAPE.hidden * SHAPE.intermediate // 2 // 2
    gathers = [one for one in sent(program) if one[0] not in ("all-reduce", "reduce-scatter")]
    assert max((size for *_, size in gathers), default=0) < weight, gathers
    assert not [one for one in gathers if one[1] in ("u8", "s32") and one[2] > SHAPE.tokens * SHAPE.top_k]
    limit = GRADIENT if function is gradient else BFLOAT16
    assert (
        errors(compiled(placed), jax.jit(function)(layer)) <= 2 * limit.relative
    )  # either is within the limit of exact


@pytest.mark.parametrize("how", HOW)
def test_the_same_inputs_give_the_same_bits(how: str) -> None:
    axes = jmoe.MeshAxes("e")
    options = {"mesh_axes": axes} if how == "named" else {}
    placed = place(layer_of(SHAPE, packed=True), mesh_of(how), axes, stacked=False)
    run = jax.jit(lambda layer: gradient(layer, **options))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, run(placed), run(placed)))


@pytest.mark.parametrize("how", HOW)
def test_a_layer_of_gpt_oss_needs_no_room_for_weights(how: str) -> None:
    layer = layer_of(LayerShape(64), packed=True)
    axes = jmoe.MeshAxes("e")
    options = {"mesh_axes": axes} if how == "named" else {}
    placed = place(layer, mesh_of(how), axes, stacked=False)
    compiled = jax.jit(lambda layer: forward(layer, **options)).lower(placed).compile()
    one_expert = 3 * 2880 * 2880 * 17 // 32
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * one_expert
    assert errors(compiled(placed), jax.jit(forward)(layer)) <= 2 * BFLOAT16.relative


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_of_a_stack_is_read_in_place(how: str, packed: bool) -> None:
    layers = [random_layer(SHAPE, seed) for seed in range(2)]
    if packed:
        layers = [dataclasses.replace(layer, experts=jmoe.pack(layer.experts)) for layer in layers]
    experts, lora = jax.tree.map(lambda *leaves: jnp.stack(leaves), *((each.experts, each.lora) for each in layers))
    stack = dataclasses.replace(layers[0], experts=experts, lora=lora)
    axes = jmoe.MeshAxes("e")
    options = {"mesh_axes": axes} if how == "named" else {}
    placed = place(stack, mesh_of(how), axes, stacked=True)
    run = jax.jit(lambda layer, index: gradient(layer, layer=index, **options))
    alone = jax.jit(lambda layer, index: gradient(layer, layer=index))
    for index in range(2):
        assert errors(run(placed, jnp.int32(index)), alone(stack, jnp.int32(index))) <= 2 * GRADIENT.relative


@pytest.mark.parametrize("how", ["Auto", "Explicit"])
def test_each_gpu_packs_its_own_experts(how: str) -> None:
    experts = random_layer(SHAPE).experts
    split = jax.device_put(experts, NamedSharding(mesh_of(how), P("e")))
    packed = jmoe.pack(split)
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(jmoe.pack(experts)), strict=True):
        assert one.sharding.spec[0] == "e"
        assert np.array_equal(jax.device_get(one), jax.device_get(other))
    assert not sent(jax.jit(jmoe.pack).lower(split).compile().as_text())
