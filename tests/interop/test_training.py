"""The same training in JAX and in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jmoe
from jmoe.interop.moe import moe
from jmoe.ops.random_layer import LayerShape, random_layer
from tests.torch_layers import Experts, Lora, Weight

pytestmark = pytest.mark.interpret

STEPS, RATE = 10, 1e-2
MATRICES = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def tensor(array: jax.Array) -> torch.Tensor:
    """A copy in torch."""
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(array.astype(jnp.float32))).bfloat16()
    return torch.from_numpy(np.array(array))


@pytest.mark.slow
def test_ten_steps_of_adam_end_at_the_same_adapters() -> None:
    shape = LayerShape(40, hidden=64, intermediate=96, experts=4, top_k=2, adapters=1, rank=4)
    layer = random_layer(shape)
    target = jax.random.normal(jax.random.key(3), layer.x.shape)
    start = {name: getattr(layer.lora, name).astype(jnp.float32) for name in MATRICES}
    scales = {"gate_up_scale": layer.lora.gate_up_scale, "down_scale": layer.lora.down_scale}

    def loss(adapter: dict[str, jax.Array]) -> jax.Array:
        y = jmoe.moe(layer.x, layer.router_logits, layer.experts, top_k=2, lora=jmoe.Lora(**adapter, **scales))
        return jnp.mean((y.astype(jnp.float32) - target) ** 2)

    optimizer = optax.adam(RATE)
    ours, state, losses = start, optimizer.init(start), []
    step = jax.jit(jax.value_and_grad(loss))
    for _ in range(STEPS):
        value, gradient = step(ours)
        with jax.numpy_dtype_promotion("standard"):  # as optax needs it
            updates, state = optimizer.update(gradient, state)
        ours = optax.apply_updates(ours, updates)
        losses.append(float(value))

    weight = lambda w: Weight(tensor(w.blocks), tensor(w.scales))  # noqa: E731
    e = layer.experts
    experts = Experts(weight(e.gate_up), tensor(e.gate_up_bias), weight(e.down), tensor(e.down_bias))
    theirs = {name: tensor(array).requires_grad_() for name, array in start.items()}
    lora = Lora(**theirs, **{name: tensor(scale) for name, scale in scales.items()})
    adam = torch.optim.Adam(theirs.values(), lr=RATE)
    for i in range(STEPS):
        adam.zero_grad()
        y = moe(tensor(layer.x), tensor(layer.router_logits), experts, top_k=2, lora=lora)
        value = ((y.float() - tensor(target)) ** 2).mean()
        value.backward()
        adam.step()
        assert float(value.detach()) == pytest.approx(losses[i], rel=1e-2)

    assert losses[-1] < 0.9 * losses[0]
    for name in MATRICES:
        moved = np.linalg.norm(ours[name] - start[name])
        assert moved > 0.03 * np.linalg.norm(start[name])
        assert np.linalg.norm(theirs[name].detach().numpy() - ours[name]) <= 1e-2 * np.linalg.norm(ours[name])
