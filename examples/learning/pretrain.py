"""The whole model, trained: every weight in float32, the experts among them.

jmoe's kernels take experts for constants, so here every expert computes every token, in two plain products.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, UInt8

from jmoe import Experts, Routing, route
from jmoe.gpt_oss.attention import attend
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.layer import linear
from jmoe.gpt_oss.model import shortest_period
from jmoe.gpt_oss.products import product
from jmoe.gpt_oss.rope import cosine_and_sine
from jmoe.gpt_oss.weights import LayerWeights, Linear, sizes, slice_layers
from jmoe.nn.statistics import router_statistics
from jmoe.ops.norm import rms_norm
from jmoe.ops.rotary import rotate
from jmoe.ops.xla.swiglu import swiglu

BALANCE = 0.01
"""Weight of the loss that spreads tokens over experts."""


class Weights(NamedTuple):
    """What jmoe.gpt_oss.GptOss is made of: embedding and head [V, H], layers' arrays [L, ...], norm [H]; float32."""

    embedding: Array
    layers: LayerWeights
    norm: Array
    head: Array


@functools.partial(jax.jit, static_argnames="config")
def new_weights(key: Array, config: Config) -> Weights:
    """Random weights that keep activations about 1, and biases of zero."""
    keys = iter(jax.random.split(key, 16))
    layers, hidden, experts = config.num_hidden_layers, config.hidden_size, config.num_local_experts
    shapes = sizes(config)

    def normal(*shape: int, gain: float = 1.0) -> Array:
        return gain / math.sqrt(shape[-1]) * jax.random.normal(next(keys), shape)

    def new_linear(n: int, k: int, gain: float = 1.0) -> Linear:
        return Linear(normal(layers, n, k, gain=gain), jnp.zeros((layers, n)))

    last = 1 / math.sqrt(2 * layers)  # of what is added to the layers' input
    of_layers = LayerWeights(
        attention_norm=jnp.ones((layers, hidden)),
        qkv=new_linear(sum(shapes[name][0] for name in ("q", "k", "v")), hidden),
        o=new_linear(*shapes["o"], gain=last),
        sinks=jnp.zeros((layers, config.num_attention_heads)),
        moe_norm=jnp.ones((layers, hidden)),
        router=new_linear(experts, hidden),
        experts=Experts(
            normal(layers, experts, *shapes["gate_up"]),
            jnp.zeros((layers, experts, shapes["gate_up"][0])),
            normal(layers, experts, *shapes["down"], gain=last),
            jnp.zeros((layers, experts, hidden)),
        ),
    )
    vocabulary = (config.vocab_size, hidden)
    return Weights(normal(*vocabulary), of_layers, jnp.ones(hidden), normal(*vocabulary))


def all_experts(x: Float[Array, "B T H"], routing: Routing, experts: Experts, config: Config) -> Float[Array, "B T H"]:
    """jmoe.moe by every expert on every token, with 0 for the weight of those that were not chosen."""
    chosen = jax.nn.one_hot(routing.experts, config.num_local_experts)
    gates = jnp.einsum("btk,btke->bte", routing.weights, chosen)
    z = product("bth,enh->bten", x, experts.gate_up) + experts.gate_up_bias
    h = swiglu(z.reshape(-1, z.shape[-1]), config.activation).reshape(*z.shape[:-1], -1)
    gated = (gates[..., None] * h).astype(x.dtype)
    y = product("btei,ehi->bth", gated, experts.down) + jnp.einsum("bte,eh->bth", gates, experts.down_bias)
    return y.astype(x.dtype)


def forward(
    weights: Weights, tokens: UInt8[Array, "B T"], config: Config, dtype: jnp.dtype
) -> tuple[Float[Array, "B T V"], Float[Array, ""]]:
    """(float32 logits, the load-balancing loss), as jmoe.gpt_oss.GptOss computes them, with a gradient in all."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rotary = cosine_and_sine(config.rope, config.head_dim, positions)
    heads = config.num_attention_heads, config.num_attention_heads + config.num_key_value_heads

    def layer(x: Array, own: LayerWeights, window: int | None) -> tuple[Array, Array]:
        normal = rms_norm(x, own.attention_norm, config.rms_norm_eps)
        q, k, v = jnp.split(linear(normal, own.qkv).reshape(*x.shape[:2], -1, config.head_dim), heads, axis=2)
        keys = rotate(k, *rotary)
        attended = attend(rotate(q, *rotary), keys, v, own.sinks, window=window, implementation="xla")
        x = x + linear(attended.reshape(*x.shape[:2], -1), own.o)
        normal = rms_norm(x, own.moe_norm, config.rms_norm_eps)
        logits = linear(normal, own.router)
        routing = route(logits, config.num_experts_per_tok)
        balance = router_statistics(logits, routing).load_balancing_loss
        return x + all_experts(normal, routing, own.experts, config), balance

    period = shortest_period(config.windows)

    def group(x: Array, own: LayerWeights) -> tuple[Array, Array]:
        balance = jnp.float32(0)
        for i in range(period):
            of_one = jax.tree.map(lambda leaf, i=i: leaf[i], own)
            x, loss = jax.checkpoint(layer, static_argnums=2)(x, of_one, config.windows[i])
            balance += loss
        return x, balance

    x = weights.embedding[tokens].astype(dtype)
    x, balance = lax.scan(group, x, slice_layers(weights.layers, config.num_hidden_layers // period))
    normal = rms_norm(x, weights.norm, config.rms_norm_eps)
    return product("bth,vh->btv", normal, weights.head), balance.sum() / config.num_hidden_layers


def train(
    config: Config,
    batches: Iterable[UInt8[np.ndarray, "B T"]],
    steps: int,
    rate: float,
    dtype: jnp.dtype,
    show: Callable[[int, Array], None],
) -> Weights:
    """Weights after `steps` steps of AdamW on the next byte; show is called with each step, from 1, and its loss."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, max(1, steps // 20), steps, rate / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    def loss_of(weights: Weights, batch: Array) -> tuple[Array, Array]:
        logits, balance = forward(weights, batch[:, :-1], config, dtype)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:].astype(jnp.int32)).mean()
        return loss + BALANCE * balance, loss

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Weights, state: optax.OptState, batch: Array) -> tuple[Weights, optax.OptState, Array]:
        gradient, loss = jax.grad(loss_of, has_aux=True)(weights, batch)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    weights = new_weights(jax.random.key(0), config)
    state = optimizer.init(weights)
    for number, batch in enumerate(batches, start=1):
        weights, state, loss = step(weights, state, batch)
        show(number, loss)
    return weights
