"""The gradient of jmoe.moe in JAX: the same by any backend's rules, under every transformation, and what it keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.ops import gradient
from jmoe.ops.launch import layer as launches
from jmoe.ops.launch.local_gpu import Gpu
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from jmoe.triton_src.tile_tables import own_table

SMALL = LayerShape(6, hidden=64, intermediate=96, experts=4, top_k=2, adapters=2, rank=3, mixed=True)


def run(layer: Layer, **options: object) -> jax.Array:
    return jmoe.moe(
        layer.x, layer.router_logits, layer.experts, top_k=2, lora=layer.lora, adapter_ids=layer.adapter_ids, **options
    )


def floats(layer: Layer) -> dict[str, jax.Array | jmoe.Lora]:
    """What is differentiated."""
    biases = {"gate_up_bias": layer.experts.gate_up_bias, "down_bias": layer.experts.down_bias}
    return {"x": layer.x, "router_logits": layer.router_logits, "lora": layer.lora, **biases}


def loss(parts: dict, layer: Layer, **options: object) -> jax.Array:
    """A sum of which y's gradient differs from element to element."""
    experts = dataclasses.replace(layer.experts, gate_up_bias=parts["gate_up_bias"], down_bias=parts["down_bias"])
    layer = dataclasses.replace(
        layer, x=parts["x"], router_logits=parts["router_logits"], lora=parts["lora"], experts=experts
    )
    y = run(layer, **options).astype(jnp.float32)
    return jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape)))


def assert_close(a: object, b: object) -> None:
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_platforms_gradient_is_that_of_xla(recompute: bool) -> None:
    layer = random_layer(SMALL)
    ours = jax.jit(jax.grad(functools.partial(loss, recompute=recompute)))(floats(layer), layer)
    assert_close(ours, jax.grad(functools.partial(loss, backend="xla"))(floats(layer), layer))
    assert float(jnp.linalg.norm(ours["lora"].gate_up_a)) > 0


def test_an_adapter_that_no_token_uses_may_be_nan() -> None:
    layer = dataclasses.replace(random_layer(SMALL), adapter_ids=jnp.array([1, -1, 1, 1, -1, 1], jnp.int32))
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), layer.lora)
    want, got = (
        jax.grad(functools.partial(loss, backend="xla"))({**floats(layer), "lora": lora}, layer)
        for lora in (layer.lora, broken)
    )
    assert_close(got, want)


def test_scales_of_lora_are_constants() -> None:
    layer = random_layer(SMALL)
    for backend in (None, "xla"):
        gradient = jax.grad(functools.partial(loss, backend=backend))(floats(layer), layer)["lora"]
        assert not gradient.gate_up_scale.any()
        assert not gradient.down_scale.any()


@pytest.mark.slow
def test_under_checkpoint_scan_and_vmap() -> None:
    layer = random_layer(SMALL)
    parts = floats(layer)

    def stacked(parts: dict, transform: object) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            moved = dataclasses.replace(layer, x=x, lora=parts["lora"])
            return transform(lambda x: run(dataclasses.replace(moved, x=x)))(x), None

        return jnp.sum(jax.lax.scan(step, parts["x"], None, length=2)[0].astype(jnp.float32) ** 2)

    plain = jax.grad(stacked)(parts, lambda f: f)
    policy = jax.checkpoint_policies.save_only_these_names("jmoe_pre_activations")
    for transform in (jax.checkpoint, functools.partial(jax.checkpoint, policy=policy)):
        assert_close(jax.jit(jax.grad(stacked), static_argnums=1)(parts, transform), plain)

    xs = jnp.stack([layer.x, layer.x[::-1]])
    of_x = jax.grad(lambda x: loss({**parts, "x": x}, layer))
    assert_close(jax.vmap(of_x)(xs), jnp.stack([of_x(x) for x in xs]))
    of_lora = lambda xs: jax.grad(  # noqa: E731
        lambda lora: jnp.sum(jax.vmap(lambda x: loss({**parts, "x": x, "lora": lora}, layer))(xs))
    )(parts["lora"])
    alone = [jax.grad(lambda lora, x=x: loss({**parts, "x": x, "lora": lora}, layer))(parts["lora"]) for x in xs]
    assert_close(of_lora(xs), jax.tree.map(lambda a, b: (a + b).astype(a.dtype), *alone))


def test_bf16_experts_are_differentiated_where_xla_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "gpu_of", lambda target: Gpu(90, own_table(90)))  # as on a machine with an H100
    layer = random_layer(dataclasses.replace(SMALL, mxfp4=False))

    def of_weights(gate_up: jax.Array, backend: object) -> jax.Array:
        experts = dataclasses.replace(layer.experts, gate_up=gate_up)
        return jnp.sum(run(dataclasses.replace(layer, experts=experts), backend=backend).astype(jnp.float32) ** 2)

    gradient = jax.grad(of_weights)
    assert_close(gradient(layer.experts.gate_up, None), gradient(layer.experts.gate_up, "xla"))
    with pytest.raises(NotImplementedError, match='no gradient in them; differentiate bf16 experts with backend="xla"'):
        gradient(layer.experts.gate_up, "triton")
    traced = jax.jit(gradient, static_argnums=1).trace(layer.experts.gate_up, None)
    with pytest.raises(NotImplementedError, match="no gradient in them"):
        traced.lower(lowering_platforms=("cuda",))


def test_forward_mode_is_an_error() -> None:
    layer = random_layer(SMALL)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: run(dataclasses.replace(layer, x=x)), (layer.x,), (layer.x,))


def test_mxfp4_experts_are_constants() -> None:
    layer = random_layer(SMALL)
    with pytest.raises(TypeError, match="uint8"):
        jax.grad(lambda experts: run(dataclasses.replace(layer, experts=experts)).sum())(layer.experts)


def test_no_tokens_have_no_gradient() -> None:
    layer = random_layer(dataclasses.replace(SMALL, tokens=0))
    gradient = jax.grad(loss)(floats(layer), layer)
    assert gradient["x"].shape == (0, 64)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def kept_bytes(layer: Layer, **options: object) -> int:
    """Bytes that a compiled forward pass hands to the backward pass, apart from its own arguments."""

    def forward(parts: dict) -> object:
        return jax.vjp(functools.partial(loss, layer=layer, **options), parts)[1]

    return jax.jit(forward).lower(floats(layer)).compile().memory_analysis().output_size_in_bytes


def test_what_is_kept_is_gate_ups_result_or_nothing_but_the_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, top_k, intermediate = 64, 2, 96
    layer = random_layer(dataclasses.replace(SMALL, tokens=tokens))
    recomputed = kept_bytes(layer, recompute=True)
    # Without a GPU nothing is kept that XLA's backward pass does not read.
    assert kept_bytes(layer) == recomputed
    more = random_layer(dataclasses.replace(SMALL, tokens=2 * tokens))
    routing, inputs, of_the_loss = top_k * 8, 64 * 2 + 4 * 2 + 4, 64 * 4
    assert kept_bytes(more, recompute=True) - recomputed <= tokens * (routing + inputs + of_the_loss)
    monkeypatch.setattr(gradient, "has_cuda", lambda: True)
    # A few bytes more are the table of one more result.
    assert kept_bytes(layer) - recomputed == pytest.approx(tokens * top_k * 2 * intermediate * 2, abs=64)
