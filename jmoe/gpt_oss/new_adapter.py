"""Adapters to train."""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.weights import EXPERTS, TARGETS, LoraWeights, sizes


@functools.partial(jax.jit, static_argnames=("config", "targets", "ranks"))
def _factors(
    key: jax.Array, config: Config, targets: tuple[str, ...], ranks: tuple[int, ...]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    a, b = {}, {}
    for name, rank, own in zip(targets, ranks, jax.random.split(key, len(targets)), strict=True):
        n, k = sizes(config)[name]
        leading = (config.num_hidden_layers, 1, *((config.num_local_experts,) if name in EXPERTS else ()))
        bound = 1 / math.sqrt(k)
        a[name] = jax.random.uniform(own, (*leading, rank, k), jnp.float32, -bound, bound)
        b[name] = jnp.zeros((*leading, n, rank), jnp.float32)
    return a, b


def new_adapter(
    config: Config,
    *,
    rank: int | Mapping[str, int],
    scale: float | Mapping[str, float],
    targets: Sequence[str] = TARGETS,
    seed: int = 0,
) -> LoraWeights:
    """One float32 adapter that changes nothing yet: A uniform within 1 / sqrt(K), as PEFT has it, and B zero.

    Args:
      rank: of all targets, or each target's.
      scale: alpha / r, or alpha / sqrt(r); of all targets, or each target's.
      targets: what it is on, some of jmoe.gpt_oss.weights.TARGETS.

    Raises:
      ValueError: a rank is below 1 or missing, or a target is unknown; it would train nothing.
    """
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise ValueError(f"targets must be some of {', '.join(TARGETS)}, got {list(targets)}")
    ordered = tuple(name for name in TARGETS if name in targets)
    ranks = of_each("rank", rank, ordered)
    if min(ranks.values()) < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    a, b = _factors(jax.random.key(seed), config, ordered, tuple(ranks.values()))
    scales = {
        name: jnp.full((config.num_hidden_layers, 1), own, jnp.float32)
        for name, own in of_each("scale", scale, ordered).items()
    }
    return LoraWeights(a, b, scales)


def of_each[T](name: str, value: T | Mapping[str, T], targets: Sequence[str]) -> dict[str, T]:
    """Each target's value, of one for all or of one for each. Raises ValueError if a target has none."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(targets, value)
    if missing := [target for target in targets if target not in value]:
        raise ValueError(f"{name} must have a value for each target, got none for {', '.join(missing)}")
    return {target: value[target] for target in targets}
