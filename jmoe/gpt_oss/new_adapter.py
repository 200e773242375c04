"""Adapters to train."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.weights import EXPERTS, TARGETS, LoraWeights, sizes


@functools.partial(jax.jit, static_argnames=("config", "targets", "rank"))
def _factors(
    key: jax.Array, config: Config, targets: tuple[str, ...], rank: int
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    a, b = {}, {}
    for name, own in zip(targets, jax.random.split(key, len(targets)), strict=True):
        n, k = sizes(config)[name]
        leading = (config.num_hidden_layers, 1, *((config.num_local_experts,) if name in EXPERTS else ()))
        bound = 1 / math.sqrt(k)
        a[name] = jax.random.uniform(own, (*leading, rank, k), jnp.float32, -bound, bound)
        b[name] = jnp.zeros((*leading, n, rank), jnp.float32)
    return a, b


def new_adapter(
    config: Config, *, rank: int, scale: float, targets: Sequence[str] = TARGETS, seed: int = 0
) -> LoraWeights:
    """One float32 adapter that changes nothing yet: A uniform within 1 / sqrt(K), as PEFT has it, and B zero.

    Args:
      scale: alpha / r, or alpha / sqrt(r).
      targets: what it is on, some of jmoe.gpt_oss.weights.TARGETS.

    Raises:
      ValueError: the rank is below 1, or a target is none; it would train nothing.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise ValueError(f"targets must be some of {', '.join(TARGETS)}, got {list(targets)}")
    ordered = tuple(name for name in TARGETS if name in targets)
    a, b = _factors(jax.random.key(seed), config, ordered, rank)
    scales = {name: jnp.full((config.num_hidden_layers, 1), scale, jnp.float32) for name in ordered}
    return LoraWeights(a, b, scales)
