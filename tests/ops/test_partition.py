"""The XLA backend on arrays that a mesh splits, under plain jit: what devices send each other."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jmoe
from jmoe.ops.random_layer import LayerShape, random_layer

SHAPE = LayerShape(6, hidden=64, intermediate=96, experts=4, top_k=2, adapters=2, rank=3, mixed=True)


def sizes_sent(program: str) -> list[int]:
    """Elements of each result of a gather or an exchange among devices."""
    shapes = re.findall(r"= *\(?[a-z0-9]+\[([0-9,]*)\][^=]*(?:all-gather|all-to-all|collective-permute)\(", program)
    return [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_experts_split_over_a_mesh_are_not_gathered(kind: AxisType) -> None:
    layer = random_layer(SHAPE)
    mesh = jax.make_mesh((2,), ("e",), devices=jax.devices("cpu")[:2], axis_types=(kind,))
    place = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))  # noqa: E731
    experts, x, logits, lora, ids = (
        place(layer.experts, P("e")),
        *(place(each, P()) for each in (layer.x, layer.router_logits, layer.lora, layer.adapter_ids)),
    )

    def loss(x: jax.Array, lora: jmoe.Lora, experts: jmoe.Experts, logits: jax.Array, ids: jax.Array) -> jax.Array:
        y = jmoe.moe(x, logits, experts, top_k=2, lora=lora, adapter_ids=ids)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    arguments = x, lora, experts, logits, ids
    compiled = gradient.lower(*arguments).compile()
    smallest_weight = layer.experts.down.blocks.size // 2
    assert max(sizes_sent(compiled.as_text()), default=0) < smallest_weight
    want = gradient(layer.x, layer.lora, layer.experts, layer.router_logits, layer.adapter_ids)
    for one, other in zip(jax.tree.leaves(compiled(*arguments)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(
            *(jax.device_get(each).astype(np.float32) for each in (one, other)), rtol=1e-2, atol=1e-5
        )


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_other_platforms_lower(platform: str) -> None:
    layer = random_layer(SHAPE)
    call = lambda x: jnp.sum(  # noqa: E731
        jmoe.moe(x, layer.router_logits, layer.experts, top_k=2, lora=layer.lora, adapter_ids=layer.adapter_ids) ** 2
    )
    lowered = jax.jit(jax.grad(call)).trace(layer.x).lower(lowering_platforms=(platform,))
    assert "stablehlo.while" in lowered.as_text()
