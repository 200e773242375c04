"""Experts of several layers in one stack, of which a call takes one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import jmoe
from jmoe.ops.random_layer import Layer, LayerShape, random_layer

SHAPE = LayerShape(6, hidden=64, intermediate=96, experts=4, top_k=2, adapters=2, rank=3, mixed=True)
LAYERS = 3


def stack_of(shape: LayerShape = SHAPE, packed: bool = False) -> tuple[list[Layer], Layer]:
    """(layers, all of them stacked but for x, logits and ids, which are the first's)."""
    layers = [random_layer(shape, seed) for seed in range(LAYERS)]
    if packed:
        layers = [dataclasses.replace(layer, experts=jmoe.pack(layer.experts)) for layer in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return layers, dataclasses.replace(layers[0], experts=stacked.experts, lora=stacked.lora)


def call(inputs: Layer, experts: jmoe.Experts, lora: jmoe.Lora | None, **options: object) -> jax.Array:
    return jmoe.moe(
        inputs.x, inputs.router_logits, experts, top_k=2, lora=lora, adapter_ids=inputs.adapter_ids, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", [None, "xla"])
def test_a_layer_of_a_stack_is_the_layer(packed: bool, backend: str | None) -> None:
    layers, stack = stack_of(packed=packed)
    run = jax.jit(lambda index, lora: call(stack, stack.experts, lora, layer=index, backend=backend))
    for index, layer in enumerate(layers):
        want = jax.jit(functools.partial(call, backend=backend))(stack, layer.experts, layer.lora)
        assert jnp.array_equal(run(jnp.int32(index), stack.lora), want)
        assert jnp.array_equal(run(jnp.int32(index), layer.lora), want)
        assert jnp.array_equal(call(stack, stack.experts, stack.lora, layer=index, backend=backend), want)


def test_the_gradient_of_a_stack_is_that_of_its_layer() -> None:
    layers, stack = stack_of(dataclasses.replace(SHAPE, mxfp4=False))

    def loss(lora: jmoe.Lora, bias: jax.Array, **options: object) -> jax.Array:
        experts = dataclasses.replace(stack.experts, down_bias=bias)
        return jnp.sum(call(stack, experts, lora, **options).astype(jnp.float32) ** 2)

    whole, bias = jax.grad(functools.partial(loss, layer=1), argnums=(0, 1))(stack.lora, stack.experts.down_bias)
    sliced, _ = jax.grad(functools.partial(loss, layer=1), argnums=(0, 1))(layers[1].lora, stack.experts.down_bias)
    assert not bias[0].any()
    assert bias[1].any()
    for all_layers, one in zip(jax.tree.leaves(whole), jax.tree.leaves(sliced), strict=True):
        assert not all_layers[0].any()
        assert jnp.array_equal(all_layers[1], one)


def lowered(function: object, *arguments: object) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("architecture", "packed"), [("sm_90", True), ("sm_90", False), ("sm_80", False)])
def test_no_weight_is_sliced_out_of_a_stack(architecture: str, packed: bool) -> None:
    _, stack = stack_of(dataclasses.replace(SHAPE, adapters=1, mixed=False), packed)
    target = jmoe.Target(architecture)

    def run_layers(x: jax.Array, stack: Layer) -> jax.Array:
        def step(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            here = dataclasses.replace(stack, x=x)
            return call(here, stack.experts, stack.lora, layer=index, backend=target), None

        return jax.lax.scan(step, x, jnp.arange(LAYERS))[0]

    program = lowered(run_layers, stack.x, stack)
    assert program.count("@triton_kernel_call_ffi") == (3 if packed else 6)
    slices = [line for line in program.splitlines() if "dynamic_slice" in line]
    assert all("tensor<3xi32>" in line for line in slices), slices
    gradient = jax.grad(lambda x, stack: jnp.sum(run_layers(x, stack).astype(jnp.float32)))
    program = lowered(gradient, stack.x, stack)
    assert not [line for line in program.splitlines() if "dynamic_slice" in line and "x4x" in line]


def test_elsewhere_a_packed_layer_is_taken_out_before_it_is_unpacked() -> None:
    _, stack = stack_of(packed=True)
    run = lambda index: call(stack, stack.experts, stack.lora, layer=index, backend=jmoe.Target("sm_80"))  # noqa: E731
    assert lowered(run, jnp.int32(1)).count("@triton_kernel_call_ffi") == 6


def test_stacks_that_do_not_fit_are_an_error() -> None:
    layers, stack = stack_of()
    with pytest.raises(ValueError, match=r"layer must be in \[0, 3\), got 3"):
        call(stack, stack.experts, stack.lora, layer=3)
    with pytest.raises(ValueError, match="layer must be an integer scalar"):
        call(stack, stack.experts, stack.lora, layer=1.5)
    fewer = dataclasses.replace(stack.experts, down_bias=stack.experts.down_bias[:2])
    with pytest.raises(ValueError, match="one leading axis of layers"):
        call(stack, fewer, stack.lora, layer=0)
    with pytest.raises(ValueError, match=r"experts.gate_up"):
        call(stack, layers[0].experts, layers[0].lora, layer=0)
