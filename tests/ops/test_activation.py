"""Other activations than gpt-oss's through jmoe.moe: numbers and gradients on XLA, programs for CUDA, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.nn import MoE
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from tests.ops.test_lowering import launches, lower, lower_gradient

ACTIVATIONS = {
    "silu(gate) * up": jmoe.SiluAndMul(),
    "halves": jmoe.SiluAndMul(interleaved=False),
    "clamped": jmoe.SwiGLU(alpha=0.7, limit=0.75, offset=-0.5),
}
SMALL = LayerShape(7, hidden=64, intermediate=96, experts=4, top_k=2, adapters=2, rank=3, mixed=True)


def halves(layer: Layer) -> Layer:
    """The same layer with all of gate before all of up."""
    split = lambda array, axis: jnp.concatenate(  # noqa: E731
        [jax.lax.slice_in_dim(array, first, None, 2, axis) for first in (0, 1)], axis
    )
    experts = dataclasses.replace(
        layer.experts,
        gate_up=jax.tree.map(lambda part: split(part, 1), layer.experts.gate_up),
        gate_up_bias=split(layer.experts.gate_up_bias, 1),
    )
    return dataclasses.replace(
        layer, experts=experts, lora=dataclasses.replace(layer.lora, gate_up_b=split(layer.lora.gate_up_b, 2))
    )


def differentiated(layer: Layer) -> dict[str, jax.Array]:
    """What has a gradient, by name."""
    parts = {f"{p}_{part}": getattr(layer.lora, f"{p}_{part}") for p in ("gate_up", "down") for part in "ab"}
    biases = {"gate_up_bias": layer.experts.gate_up_bias, "down_bias": layer.experts.down_bias}
    return {"x": layer.x, "router_logits": layer.router_logits, **biases, **parts}


def run(parts: dict[str, jax.Array], layer: Layer, activation: jmoe.SwiGLU, **options: object) -> jax.Array:
    """The layer with these parts, through jmoe.moe."""
    experts = dataclasses.replace(layer.experts, gate_up_bias=parts["gate_up_bias"], down_bias=parts["down_bias"])
    lora = dataclasses.replace(layer.lora, **{name: parts[name] for name in parts if name[-2:] in ("_a", "_b")})
    return jmoe.moe(
        parts["x"], parts["router_logits"], experts, top_k=2, lora=lora, adapter_ids=layer.adapter_ids,
        activation=activation, **options,
    )  # fmt: skip


def test_halves_are_the_same_numbers_in_another_order() -> None:
    layer = random_layer(SMALL)
    want = run(differentiated(layer), layer, jmoe.SiluAndMul())
    apart = halves(layer)
    got = run(differentiated(apart), apart, jmoe.SiluAndMul(interleaved=False))
    assert jnp.array_equal(got, want)
    assert not jnp.array_equal(run(differentiated(apart), apart, jmoe.SiluAndMul()), want)


def test_under_vmap() -> None:
    layer = random_layer(SMALL)
    parts = differentiated(layer)
    both = jnp.stack([layer.x, layer.x[::-1]])
    of_x = jax.grad(lambda x: run({**parts, "x": x}, layer, jmoe.SiluAndMul()).astype(jnp.float32).sum())
    batch, alone = jax.jit(jax.vmap(of_x))(both), jax.jit(of_x)
    for got, x in zip(batch, both, strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), alone(x).astype(jnp.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("architecture", "interleaved"), [("sm_80", False), ("sm_90", True)])
def test_portable_kernels_compile(architecture: str, interleaved: bool) -> None:
    shape = dataclasses.replace(SMALL, intermediate=33, mxfp4=False)
    # As test_every_gradient_compiles counts them.
    assert launches(lower_gradient(shape, architecture, activation=jmoe.SiluAndMul(interleaved=interleaved))) == 22


def test_packed_kernels_compile() -> None:
    shape = LayerShape(5, hidden=128, intermediate=128, experts=4, top_k=2)
    assert launches(lower(shape, "sm_90", packed=True, activation=jmoe.SiluAndMul())) == 3
    grouped = dataclasses.replace(shape, tokens=1000)
    assert launches(lower_gradient(grouped, "sm_90", packed=True, activation=jmoe.SiluAndMul())) == 13


def test_a_module_has_an_activation() -> None:
    layer = random_layer(dataclasses.replace(SMALL, adapters=0, mixed=False))
    kernel = jax.random.normal(jax.random.key(0), (64, 4), jnp.bfloat16)
    module = MoE.from_weights(layer.experts, kernel, top_k=2, activation=jmoe.SiluAndMul())
    logits = module.router_logits(layer.x)
    want = jmoe.moe(layer.x, logits, layer.experts, top_k=2, activation=jmoe.SiluAndMul())
    assert jnp.array_equal(module(layer.x), want)
    assert not jnp.array_equal(MoE.from_weights(layer.experts, kernel, top_k=2)(layer.x), want)


def test_what_has_no_kernel_is_refused() -> None:
    layer = random_layer(SMALL)
    packed = jmoe.pack(layer.experts)
    call = lambda experts, activation: jmoe.moe(  # noqa: E731
        layer.x, layer.router_logits, experts, top_k=2, activation=activation
    )
    with pytest.raises(ValueError, match="activation must have interleaved=True with packed experts"):
        call(packed, jmoe.SiluAndMul(interleaved=False))
    with pytest.raises(ValueError, match="activation must have interleaved=True with packed experts"):
        MoE.from_weights(packed, jnp.zeros((64, 4)), top_k=2, activation=jmoe.SiluAndMul(interleaved=False))
    with pytest.raises(ValueError, match=r"activation must be a jmoe\.SwiGLU, got .*silu"):
        call(layer.experts, jax.nn.silu)
