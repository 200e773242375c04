"""The Flax layers with experts that a mesh splits: the same results, and no weight is sent."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jmoe
from jmoe.nn import LoraConfig, MoE, linen_moe
from tests.ops.mesh_program import errors, sent

HOW = ["Auto", "Explicit", pytest.param("named", marks=pytest.mark.slow)]


def mesh_of(how: str) -> jax.sharding.Mesh:
    kind = AxisType.Explicit if how == "Explicit" else AxisType.Auto
    return jax.make_mesh((2,), ("e",), devices=jax.devices("cpu")[:2], axis_types=(kind,))


def spec_of(name: str) -> P:
    """Where the variable of this name has its experts."""
    if name.startswith("router") or name.endswith("_scale"):
        return P()
    return P(None, "e") if name.endswith(("_a", "_b")) else P("e")


def place(tree: Any, name: str, mesh: jax.sharding.Mesh) -> Any:
    return jax.device_put(tree, NamedSharding(mesh, spec_of(name)))


def layer_of(how: str) -> MoE:
    axes = jmoe.MeshAxes("e") if how == "named" else None
    return MoE(32, 32, 4, top_k=2, rngs=nnx.Rngs(0), lora=LoraConfig(2), mesh_axes=axes)


def sharded(layer: MoE, mesh: jax.sharding.Mesh) -> MoE:
    graph, state = nnx.split(layer)
    placed = [(path, jax.tree.map(lambda a, n=path[0]: place(a, n, mesh), v)) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(placed))


def check_nothing_is_sent(compiled: Any) -> None:
    gathers = [one for one in sent(compiled.as_text()) if one[0] not in ("all-reduce", "reduce-scatter")]
    assert max((size for *_, size in gathers), default=0) < 4 * 32 * 32 // 2 // 2, gathers


@pytest.mark.parametrize("how", HOW)
def test_under_nnx_jit_each_device_computes_its_own_experts(how: str) -> None:
    mesh = mesh_of(how)
    x = jax.device_put(jax.random.normal(jax.random.key(1), (4, 32)), NamedSharding(mesh, P()))
    graph, state = nnx.split(sharded(layer_of(how), mesh))
    compiled = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x).compile()
    check_nothing_is_sent(compiled)
    want = nnx.jit(MoE.__call__)(layer_of("Auto"), jax.device_get(x))
    np.testing.assert_allclose(compiled(state, x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_gradients_of_lora_stay_where_its_experts_are(how: str) -> None:
    mesh, layer = mesh_of(how), layer_of("Auto")
    x = jax.random.normal(jax.random.key(1), (2, 3, 32))

    @nnx.jit
    def gradient(layer: MoE, x: jax.Array) -> Any:
        def loss(layer: MoE) -> tuple[jax.Array, Any]:
            y, statistics = layer(x, statistics=True)
            return jnp.sum(y**2) + statistics.load_balancing_loss, y

        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True)(layer)

    placed, x_placed = sharded(layer_of(how), mesh), jax.device_put(x, NamedSharding(mesh, P()))
    got = gradient(placed, x_placed)
    assert errors(got, gradient(layer, x)) <= 2e-6
    assert {leaf.sharding.spec[1] for leaf in jax.tree.leaves(got[0])} == {"e"}


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_the_linen_module_too(how: str) -> None:
    mesh = mesh_of(how)
    axes = jmoe.MeshAxes("e") if how == "named" else None
    module = linen_moe(32, 32, 4, top_k=2, lora=LoraConfig(2), mesh_axes=axes)
    alone = linen_moe(32, 32, 4, top_k=2, lora=LoraConfig(2))
    x = jax.random.normal(jax.random.key(1), (4, 32))
    variables = jax.jit(alone.init)(jax.random.key(0), x)
    placed = {
        kind: {name: jax.tree.map(lambda a, n=name: place(a, n, mesh), variable) for name, variable in some.items()}
        for kind, some in variables.items()
    }
    compiled = jax.jit(module.apply).lower(placed, jax.device_put(x, NamedSharding(mesh, P()))).compile()
    check_nothing_is_sent(compiled)
    got = compiled(placed, jax.device_put(x, NamedSharding(mesh, P())))
    np.testing.assert_allclose(got, jax.jit(alone.apply)(variables, x), rtol=1e-5, atol=1e-6)
