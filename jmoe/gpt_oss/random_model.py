"""Random models of a given size, for tests and benchmarks."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.layer import Remat
from jmoe.gpt_oss.layout import Layout, with_auto_axes
from jmoe.gpt_oss.load import steps
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.stack import empty_stack, put_layer
from jmoe.gpt_oss.stack_on_mesh import Room
from jmoe.gpt_oss.weights import ATTENTION, TARGETS, LayerWeights, Linear, LoraWeights, qkv_rows, sizes
from jmoe.ops.launch.local_gpu import reads_packed_here
from jmoe.ops.mxfp4 import Mxfp4
from jmoe.ops.random_layer import LayerShape, random_layer


def random_model(
    config: Config,
    *,
    rank: int = 0,
    adapters: int = 1,
    packed: bool | None = None,
    seed: int = 0,
    progress: bool = False,
    remat: Remat = "nothing",
    mesh: Mesh | None = None,
    layout: Layout | None = None,
) -> GptOss:
    """A model of MXFP4 experts and bfloat16 weights whose activations keep about their size from layer to layer.

    Args:
      rank: of bfloat16 LoRA on everything it can be on; 0: none.
      packed, progress, remat: as in jmoe.gpt_oss.load, layer by layer as there.
      mesh, layout: the model is split so, and each device makes its own part; both or neither. The values are those of
        one device.
    """
    if (mesh is None) != (layout is None):
        raise ValueError(f"a layout and its mesh go together, got mesh {mesh} and layout {layout}")
    packed = reads_packed_here() if packed is None else packed
    keys = jax.random.split(jax.random.key(seed), config.num_hidden_layers + 3)
    layers = steps(config.num_hidden_layers, "making a random model", progress)
    vocabulary = (config.vocab_size, config.hidden_size)
    made = functools.partial(GptOss, config, remat=remat, layout=layout)
    if mesh is not None and layout is not None:
        layout.check(mesh, config)
        mesh = with_auto_axes(mesh)
        whole = NamedSharding(mesh, PartitionSpec())
        lora = None
        if rank:
            make_lora = functools.partial(random_lora, config=config, rank=rank, adapters=adapters)
            specs = layout.lora(jax.eval_shape(make_lora, keys[-1]))
            lora = jax.jit(make_lora, out_shardings=layout.shardings(mesh, specs))(keys[-1])
        table = jax.jit(normal, static_argnames=("shape", "scale"), out_shardings=whole)
        return made(
            embedding=table(keys[-3], vocabulary, 1.0),
            layers=random_stack_on_mesh((keys[index] for index in layers), config, mesh, layout, packed),
            norm=jnp.ones(config.hidden_size, jnp.bfloat16, device=whole),
            head=table(keys[-2], vocabulary, 1 / math.sqrt(config.hidden_size)),
            lora=lora,
        )
    stack = None
    for index in layers:
        layer = random_weights(keys[index], config)
        if stack is None:
            stack = empty_stack(layer, config.num_hidden_layers, packed)
        stack = put_layer(stack, layer, index)
    assert stack is not None
    return made(
        embedding=normal(keys[-3], vocabulary, 1.0),
        layers=stack,
        norm=jnp.ones(config.hidden_size, jnp.bfloat16),
        head=normal(keys[-2], vocabulary, 1 / math.sqrt(config.hidden_size)),
        lora=random_lora(keys[-1], config, rank, adapters) if rank else None,
    )


def random_stack_on_mesh(
    keys: Iterable[jax.Array], config: Config, mesh: Mesh, layout: Layout, packed: bool
) -> LayerWeights:
    """All layers of a model on a mesh, each device's part made by itself."""
    room = Room(mesh, config.num_hidden_layers)
    rows = qkv_rows(config, layout.size(mesh, layout.heads))

    def make(key: jax.Array) -> LayerWeights:
        layer = random_weights(key, config)
        return dataclasses.replace(layer, qkv=jax.tree.map(lambda leaf: leaf[rows], layer.qkv))

    stack = None
    for index, key in enumerate(keys):
        if stack is None:
            shapes = jax.eval_shape(make, key)
            specs = layout.layers(shapes.experts)
            of_layer = jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), specs)
            make_layer = jax.jit(make, out_shardings=layout.shardings(mesh, of_layer))

            def empty(leaf: Any, spec: Any) -> Any:
                if isinstance(leaf, Mxfp4):
                    return room.empty_mxfp4(leaf.shape, spec.blocks, packed=packed)
                return room.empty(leaf.shape, leaf.dtype, spec)

            stack = jax.tree.map(empty, shapes, specs, is_leaf=is_weight)

        def put(leaf: Any, stack: Any, spec: Any, layer: int = index) -> Any:
            if isinstance(leaf, Mxfp4):
                return room.put_experts(stack, leaf, spec.blocks, layer)
            return room.put(stack, leaf, spec, layer)

        stack = jax.block_until_ready(jax.tree.map(put, make_layer(key), stack, specs, is_leaf=is_weight))
    assert stack is not None
    return stack


def is_weight(leaf: Any) -> bool:
    """Whether it is MXFP4, whose arrays go together."""
    return isinstance(leaf, Mxfp4)


@functools.partial(jax.jit, static_argnames=("shape", "scale"))
def normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    """Normal bfloat16 of this standard deviation."""
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)


@functools.partial(jax.jit, static_argnames="config")
def random_weights(key: jax.Array, config: Config) -> LayerWeights:
    """One layer's weights, of rows with norm about 1."""
    keys = iter(jax.random.split(key, 16))

    def linear(n: int, k: int) -> Linear:
        return Linear(normal(next(keys), (n, k), 1 / math.sqrt(k)), normal(next(keys), (n,), 0.1))

    hidden = config.hidden_size
    rows = sum(sizes(config)[name][0] for name in ("q", "k", "v"))
    shape = LayerShape(1, hidden, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok)
    return LayerWeights(
        attention_norm=jnp.ones(hidden, jnp.bfloat16),
        qkv=linear(rows, hidden),
        o=linear(*sizes(config)["o"]),
        sinks=normal(next(keys), (config.num_attention_heads,), 1.0),
        moe_norm=jnp.ones(hidden, jnp.bfloat16),
        router=linear(config.num_local_experts, hidden),
        experts=random_layer(shape, next(keys)).experts,
    )


@functools.partial(jax.jit, static_argnames=("config", "rank", "adapters"))
def random_lora(key: jax.Array, config: Config, rank: int, adapters: int) -> LoraWeights:
    """Adapters on everything, a tenth as strong as the weights."""
    a, b, scale = {}, {}, {}
    for name, own in zip(TARGETS, jax.random.split(key, len(TARGETS)), strict=True):
        n, k = sizes(config)[name]
        experts = () if name in ATTENTION else (config.num_local_experts,)
        leading = (config.num_hidden_layers, adapters, *experts)
        key_a, key_b = jax.random.split(own)
        a[name] = normal(key_a, (*leading, rank, k), 1 / math.sqrt(k))
        b[name] = normal(key_b, (*leading, n, rank), 0.1 / math.sqrt(rank))
        scale[name] = jnp.ones(leading[:2], jnp.float32)
    return LoraWeights(a, b, scale)
