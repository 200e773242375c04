"""jmoe.moe on the XLA backend: its numbers against float64, and what JAX's transformations make of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jmoe
from jmoe.ops.mxfp4 import dequantize
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from jmoe.triton_src.activation import SwiGLU
from tests.tolerances import BFLOAT16, FLOAT32

SMALL = LayerShape(6, hidden=64, intermediate=96, experts=5, top_k=2)


def run(layer: Layer, top_k: int = 2, **options: object) -> jax.Array:
    """The layer through jmoe.moe."""
    given = {"lora": layer.lora, "adapter_ids": layer.adapter_ids} | options
    return jmoe.moe(layer.x, layer.router_logits, layer.experts, top_k=top_k, **given)


def exact(layer: Layer, top_k: int, activation: SwiGLU = SwiGLU()) -> np.ndarray:
    """The layer in float64 numpy, token by token."""
    wide = lambda array: np.asarray(array).astype(np.float64)  # noqa: E731
    weights = {
        name: wide(dequantize(w) if isinstance(w := getattr(layer.experts, name), jmoe.Mxfp4) else w)
        for name in ("gate_up", "down")
    }
    routing = jax.tree.map(wide, jmoe.route(layer.router_logits, top_k))

    def project(name: str, expert: int, adapter: int, x: np.ndarray) -> np.ndarray:
        bias = getattr(layer.experts, f"{name}_bias")
        z = weights[name][expert] @ x + (0 if bias is None else wide(bias[expert]))
        if adapter >= 0 and layer.lora is not None and getattr(layer.lora, f"{name}_a") is not None:
            a, b, scale = (wide(getattr(layer.lora, f"{name}_{part}")[adapter]) for part in ("a", "b", "scale"))
            z += scale * (b[expert] @ (a[expert] @ x))
        return z

    y = np.zeros(layer.x.shape)
    for token, x in enumerate(wide(layer.x)):
        adapter = 0 if layer.adapter_ids is None else int(layer.adapter_ids[token])
        for expert, weight in zip(routing.experts[token].astype(int), routing.weights[token], strict=True):
            z = project("gate_up", expert, adapter, x)
            gate, up = (z[0::2], z[1::2]) if activation.interleaved else np.split(z, 2)
            limit = np.inf if activation.limit is None else activation.limit
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            h = gate / (1 + np.exp(-activation.alpha * gate)) * (up + activation.offset)
            y[token] += weight * project("down", expert, adapter, h)
    return y


def error(y: jax.Array, want: np.ndarray) -> float:
    """||y - want|| / ||want||."""
    return float(np.linalg.norm(np.asarray(y).astype(np.float64) - want) / np.linalg.norm(want))


@pytest.mark.slow
@settings(max_examples=8)
@given(
    tokens=st.integers(8, 30),
    experts=st.integers(1, 12),
    top_k=st.integers(1, 8),
    adapters=st.integers(0, 3),
    rank=st.integers(1, 20),
    mxfp4=st.booleans(),
    bias=st.booleans(),
    activation=st.builds(
        SwiGLU, st.floats(0.25, 3), st.one_of(st.none(), st.floats(0.5, 8)), st.floats(-1, 1), st.booleans()
    ),
    seed=st.integers(0, 10**6),
)
def test_xla_agrees_with_float64(
    tokens: int,
    experts: int,
    top_k: int,
    adapters: int,
    rank: int,
    mxfp4: bool,
    bias: bool,
    activation: SwiGLU,
    seed: int,
) -> None:
    top_k = min(top_k, experts)
    shape = LayerShape(tokens, 64, 32, experts, top_k, adapters, rank, adapters > 1, mxfp4, bias)
    layer = random_layer(shape, seed)
    want = exact(layer, top_k, activation)
    assert error(run(layer, top_k, activation=activation), want) <= BFLOAT16.relative
    wide = dataclasses.replace(layer, x=layer.x.astype(jnp.float32))
    assert error(run(wide, top_k, activation=activation), want) <= FLOAT32.relative


@pytest.mark.slow
def test_one_layer_at_real_width() -> None:
    layer = random_layer(LayerShape(3, experts=4, top_k=2))
    assert error(run(layer), exact(layer, 2)) <= BFLOAT16.relative


def test_lora_on_one_projection_alone() -> None:
    layer = random_layer(dataclasses.replace(SMALL, tokens=20, adapters=1, rank=4))
    for lora in (
        jmoe.Lora(down_a=layer.lora.down_a, down_b=layer.lora.down_b, down_scale=layer.lora.down_scale),
        jmoe.Lora(layer.lora.gate_up_a, layer.lora.gate_up_b, layer.lora.gate_up_scale),
    ):
        partial = dataclasses.replace(layer, lora=lora)
        assert error(run(partial), exact(partial, 2)) <= BFLOAT16.relative


def test_an_empty_lora_changes_nothing() -> None:
    layer = random_layer(SMALL)
    assert jnp.array_equal(run(layer), run(layer, lora=jmoe.Lora()))


def test_leading_axes_are_tokens() -> None:
    layer = random_layer(dataclasses.replace(SMALL, adapters=2, rank=3, mixed=True))
    folded = dataclasses.replace(
        layer,
        x=layer.x.reshape(2, 3, 64),
        router_logits=layer.router_logits.reshape(2, 3, 5),
        adapter_ids=layer.adapter_ids.reshape(2, 3),
    )
    assert jnp.array_equal(run(folded).reshape(6, 64), run(layer))
    one = dataclasses.replace(
        layer, x=layer.x[0], router_logits=layer.router_logits[0], adapter_ids=layer.adapter_ids[0]
    )
    assert run(one).shape == (64,)


@pytest.mark.parametrize("shape", [(0, 64), (0, 3, 64), (3, 0, 64)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    layer = random_layer(SMALL)
    empty = dataclasses.replace(layer, x=jnp.zeros(shape), router_logits=jnp.zeros((*shape[:-1], 5)))
    assert run(empty).shape == shape


def test_routing_is_replayed_and_logits_ignored() -> None:
    layer = random_layer(SMALL)
    routing = jmoe.route(layer.router_logits, 2)
    assert jnp.array_equal(run(layer), run(layer, routing=routing))
    other = dataclasses.replace(layer, router_logits=None)
    assert jnp.array_equal(run(layer), run(other, routing=routing))


def test_nan_in_an_expert_reaches_only_its_tokens() -> None:
    layer = random_layer(dataclasses.replace(SMALL, tokens=20))
    scales = layer.experts.down.scales.at[2].set(255)
    experts = dataclasses.replace(layer.experts, down=jmoe.Mxfp4(layer.experts.down.blocks, scales))
    y = run(dataclasses.replace(layer, experts=experts))
    uses = (jmoe.route(layer.router_logits, 2).experts == 2).any(axis=1)
    assert 0 < uses.sum() < 20
    assert jnp.array_equal(jnp.isnan(y).all(axis=1), uses)


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences() -> None:
    layer = random_layer(dataclasses.replace(SMALL, adapters=1, rank=3))
    layer = dataclasses.replace(layer, x=layer.x.astype(jnp.float32))
    cotangent = jax.random.normal(jax.random.key(5), layer.x.shape)
    # A replayed choice of experts, so that the steps of the differences cannot change it.
    routing = jmoe.route(layer.router_logits, 2)

    def loss(x: jax.Array, b: jax.Array, weights: jax.Array) -> jax.Array:
        lora = dataclasses.replace(layer.lora, gate_up_b=b)
        changed = dataclasses.replace(layer, x=x, lora=lora)
        return jnp.sum(cotangent * run(changed, routing=jmoe.Routing(routing.experts, weights)))

    point = (layer.x, layer.lora.gate_up_b.astype(jnp.float32), routing.weights)
    gradients = jax.grad(loss, argnums=(0, 1, 2))(*point)
    for i, (value, gradient) in enumerate(zip(point, gradients, strict=True)):
        direction = jax.random.normal(jax.random.key(i), value.shape)
        step = 1e-2 / float(jnp.linalg.norm(direction))
        ahead, behind = ((*point[:i], value + s * step * direction, *point[i + 1 :]) for s in (1, -1))
        slope = (loss(*ahead) - loss(*behind)) / (2 * step)
        np.testing.assert_allclose(jnp.sum(gradient * direction), slope, rtol=2e-2)


@pytest.mark.parametrize("batched", ["tokens", "experts", "everything", "offset"])
def test_vmap_is_a_loop(batched: str) -> None:
    one, two = (random_layer(dataclasses.replace(SMALL, adapters=1, rank=3), seed) for seed in (1, 2))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, two)
    offsets = jnp.array([0, 1], jnp.int32)
    call = lambda x, logits, experts, lora, offset: run(  # noqa: E731
        Layer(x, logits, experts, lora, None), expert_offset=offset
    )
    axes = {
        "tokens": (0, 0, None, None, None),
        "experts": (None, None, 0, 0, None),
        "everything": (0, 0, 0, 0, None),
        "offset": (None, None, None, None, 0),
    }[batched]
    pick = lambda i: [  # noqa: E731
        jax.tree.map(lambda leaf, i=i, axis=axis: leaf if axis is None else leaf[i], argument)
        for argument, axis in zip(arguments, axes, strict=True)
    ]
    stacked = (both.x, both.router_logits, both.experts, both.lora, offsets)
    single = (one.x, one.router_logits, one.experts, one.lora, jnp.int32(0))
    arguments = [s if axis == 0 else o for s, o, axis in zip(stacked, single, axes, strict=True)]
    got = jax.vmap(call, in_axes=axes)(*arguments)
    for i in range(2):
        np.testing.assert_allclose(got[i].astype(jnp.float32), call(*pick(i)).astype(jnp.float32), rtol=1e-2, atol=1e-2)


def test_scan_checkpoint_and_donation() -> None:
    layer = random_layer(SMALL)
    plain = run(dataclasses.replace(layer, x=run(layer)))

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.checkpoint(lambda x: run(dataclasses.replace(layer, x=x)))(x), None

    scanned = jax.jit(lambda x: jax.lax.scan(step, x, None, length=2)[0], donate_argnums=0)(layer.x + 0)
    assert error(scanned, np.asarray(plain).astype(np.float64)) <= BFLOAT16.relative


def test_containers_pass_through_device_put_and_tree_paths() -> None:
    layer = random_layer(dataclasses.replace(SMALL, adapters=1, rank=3))
    moved = jax.device_put(layer, jax.devices()[0])
    assert jnp.array_equal(run(moved), run(layer))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(layer.experts)]
    assert paths == [
        ".gate_up.blocks",
        ".gate_up.scales",
        ".gate_up_bias",
        ".down.blocks",
        ".down.scales",
        ".down_bias",
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_orbax_saves_and_restores_containers(packed: bool, tmp_path: object) -> None:
    layer = random_layer(dataclasses.replace(SMALL, adapters=2, rank=3))
    tree = {"experts": jmoe.pack(layer.experts) if packed else layer.experts, "lora": layer.lora}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", tree)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        restored = checkpointer.restore(tmp_path / "layer", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    assert isinstance(restored["experts"].gate_up, jmoe.PackedMxfp4) == packed
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_export_and_back(packed: bool) -> None:
    layer = random_layer(dataclasses.replace(SMALL, adapters=1, rank=3))
    if packed:
        layer = dataclasses.replace(layer, experts=jmoe.pack(layer.experts))
    arguments = (layer.x, layer.router_logits, layer.experts, layer.lora)
    call = jax.jit(lambda x, logits, experts, lora: jmoe.moe(x, logits, experts, top_k=2, lora=lora, backend="xla"))
    again = jax.export.deserialize(jax.export.export(call)(*arguments).serialize())
    assert jnp.array_equal(again.call(*arguments), call(*arguments))


@pytest.mark.parametrize("packed", [False, True])
def test_vmap_inside_shard_map(packed: bool) -> None:
    layer = random_layer(LayerShape(6, hidden=64, intermediate=96, experts=4, top_k=2))
    experts = jmoe.pack(layer.experts) if packed else layer.experts
    mesh = jax.make_mesh((2,), ("tokens",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def shard(x: jax.Array, logits: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, logits: jmoe.moe(x, logits, experts, top_k=2))(x, logits)

    sharded = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P("tokens"), out_specs=P("tokens")))
    assert jnp.array_equal(sharded(layer.x, layer.router_logits), jax.jit(run)(layer))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["tokens", "experts", "both"])
@pytest.mark.parametrize("recompute", [False, True])
def test_explicit_axes(recompute: bool, split: str) -> None:
    layer = random_layer(LayerShape(6, hidden=64, intermediate=96, experts=4, top_k=2, adapters=2, rank=3, mixed=True))
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Explicit,))

    def loss(x: jax.Array, logits: jax.Array, lora: jmoe.Lora, ids: jax.Array, experts: jmoe.Experts) -> jax.Array:
        y = jmoe.moe(x, logits, experts, top_k=2, lora=lora, adapter_ids=ids, recompute=recompute)
        assert jax.typeof(y).sharding.spec == jax.typeof(x).sharding.spec
        return jnp.sum(y.astype(jnp.float32) ** 2)

    arguments = layer.x, layer.router_logits, layer.lora, layer.adapter_ids, layer.experts
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    want = gradient(*arguments)
    tokens, experts = (P("d") if split in (of, "both") else P() for of in ("tokens", "experts"))
    specs = tokens, tokens, P(), tokens, experts
    got = gradient(
        *(jax.device_put(one, jax.NamedSharding(mesh, spec)) for one, spec in zip(arguments, specs, strict=True))
    )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(
            *(jax.device_get(each).astype(np.float32) for each in (one, other)), rtol=1e-2, atol=1e-5
        )


def test_vmap_over_nothing() -> None:
    layer = random_layer(LayerShape(6, hidden=64, intermediate=96, experts=4, top_k=2))
    call = jax.jit(jax.vmap(lambda x, logits: jmoe.moe(x, logits, layer.experts, top_k=2)))
    assert call(jnp.zeros((0, 6, 64), jnp.bfloat16), jnp.zeros((0, 6, 4))).shape == (0, 6, 64)


def test_an_unknown_adapter_in_a_stack_leaves_the_gradients_of_others() -> None:
    layer = random_layer(LayerShape(4, hidden=64, intermediate=96, experts=4, top_k=2, adapters=2, rank=3, mixed=True))

    @jax.jit
    @jax.grad
    def gradient(lora: jmoe.Lora, ids: jax.Array) -> jax.Array:
        x = layer.x
        for _ in range(2):
            x = x + jmoe.moe(x, layer.router_logits, layer.experts, top_k=2, lora=lora, adapter_ids=ids)
        return jnp.sum(jnp.where(ids[:, None] == 7, 0, x).astype(jnp.float32))

    got = gradient(layer.lora, jnp.array([0, 1, 7, 1]))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(got))


def test_expert_shards_under_shard_map_sum_to_the_whole() -> None:
    layer = random_layer(LayerShape(6, hidden=64, intermediate=96, experts=4, top_k=2))
    mesh = jax.make_mesh((2,), ("experts",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def shard(x: jax.Array, logits: jax.Array, experts: jmoe.Experts) -> jax.Array:
        offset = jax.lax.axis_index("experts") * 2
        y = jmoe.moe(x, logits, experts, top_k=2, expert_offset=offset)
        return jax.lax.psum(y.astype(jnp.float32), "experts")

    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(P(), P(), P("experts")), out_specs=P())
    y = jax.jit(sharded)(layer.x, layer.router_logits, layer.experts)
    assert error(y, np.asarray(run(layer)).astype(np.float64)) <= BFLOAT16.relative
