"""Random models of a given size, for tests and benchmarks."""

import functools
import math

import jax
import jax.numpy as jnp

from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.layer import Remat
from jmoe.gpt_oss.load import steps
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.stack import empty_stack, put_layer
from jmoe.gpt_oss.weights import ATTENTION, TARGETS, LayerWeights, Linear, LoraWeights, sizes
from jmoe.ops.launch.local_gpu import reads_packed_here
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
) -> GptOss:
    """A model of MXFP4 experts and bfloat16 weights whose activations keep about their size from layer to layer.

    Args:
      rank: of bfloat16 LoRA on everything it can be on; 0: none.
      packed, progress, remat: as in jmoe.gpt_oss.load, layer by layer as there.
    """
    packed = reads_packed_here() if packed is None else packed
    keys = jax.random.split(jax.random.key(seed), config.num_hidden_layers + 3)
    stack = None
    for index in steps(config.num_hidden_layers, "making a random model", progress):
        layer = random_weights(keys[index], config)
        if stack is None:
            stack = empty_stack(layer, config.num_hidden_layers, packed)
        stack = put_layer(stack, layer, index)
    assert stack is not None
    vocabulary = (config.vocab_size, config.hidden_size)
    return GptOss(
        config,
        embedding=normal(keys[-3], vocabulary, 1.0),
        layers=stack,
        norm=jnp.ones(config.hidden_size, jnp.bfloat16),
        head=normal(keys[-2], vocabulary, 1 / math.sqrt(config.hidden_size)),
        lora=random_lora(keys[-1], config, rank, adapters) if rank else None,
        remat=remat,
    )


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
