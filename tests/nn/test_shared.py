"""Experts that every token uses: numbers beside jax.numpy's, what is trained, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe
from jmoe.nn import LoraConfig, MoE, trainable_report

H, I, S = 64, 96, 2  # noqa: E741


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / 8


def shared_experts() -> jmoe.Experts:
    return jmoe.Experts(normal(0, S, 2 * I, H), None, normal(1, S, H, I), None)


def layer(**options: object) -> MoE:
    return MoE(H, 32, 4, top_k=2, activation=jmoe.SiluAndMul(), rngs=nnx.Rngs(0), mxfp4=False, **options)


@pytest.mark.parametrize("gated", [False, True])
def test_every_token_uses_them(gated: bool) -> None:
    x, gate, experts = normal(2, 3, 5, H) * 8, normal(3, H, S), shared_experts()
    with_shared = layer(shared=experts, shared_gate=gate if gated else None)
    want = layer()(x)
    weights = jax.nn.sigmoid(x @ gate) if gated else jnp.ones((3, 5, S))
    for each in range(S):
        z = x @ experts.gate_up[each].T
        want += weights[..., each, None] * ((jax.nn.silu(z[..., 0::2]) * z[..., 1::2]) @ experts.down[each].T)
    np.testing.assert_allclose(with_shared(x), want, rtol=1e-4, atol=1e-4)


def test_lora_trains_beside_them_and_they_are_frozen() -> None:
    model = layer(shared=shared_experts(), lora=LoraConfig(2))
    assert not any(t.trainable for t in trainable_report(model, nnx.LoRAParam).tensors if t.path.startswith("shared"))
    trained = layer(shared=shared_experts(), shared_gate=normal(3, H, S), train_experts=True)
    gradient = nnx.grad(lambda model: jnp.sum(model(normal(2, 5, H)) ** 2))(trained)
    for name in ("gate_up", "down", "gate"):
        assert jnp.any(gradient["shared"][name][...] != 0), name


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="shared experts must have the layer's H = 64, got 32"):
        layer(shared=jmoe.Experts(jnp.zeros((1, 8, 32)), None, jnp.zeros((1, 32, 4)), None))
    with pytest.raises(ValueError, match=r"shared_gate must have shape \(64, 2\), got \(64, 1\)"):
        layer(shared=shared_experts(), shared_gate=jnp.zeros((H, 1)))
    with pytest.raises(ValueError, match="shared_gate was given without shared experts"):
        layer(shared_gate=jnp.zeros((H, 1)))
