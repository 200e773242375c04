"""Adapters as every reader of PEFT's format reads them, and which readers fail on others."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.gpt_oss.adapter import TargetFactors, pad
from jmoe.gpt_oss.weights import EXPERTS, LoraWeights


def portable(lora: LoraWeights, adapter: int) -> LoraWeights:
    """One adapter with the same effect, float32, all of whose scales are 1 and whose ranks are one.

    Scales are multiplied into B and smaller ranks padded with zeros; where a layer has LoRA on one of the experts'
    projections, the other gets factors of zeros.
    """
    own = {target: adapter_factors(lora, target, adapter) for target in lora.a}
    for target, other in (EXPERTS, EXPERTS[::-1]):
        if target in own and other not in own:
            own[other] = zeros(own[target], other)
    rank = max(factors.a.shape[-2] for factors in own.values())
    on_experts = np.any([np.asarray(own[target].scale) != 0 for target in EXPERTS if target in own], axis=0)
    scales = {
        target: jnp.asarray(on_experts if target in EXPERTS else factors.scale != 0, jnp.float32)
        for target, factors in own.items()
    }
    a = {target: pad(factors.a, -2, rank) for target, factors in own.items()}
    b = {target: pad(scaled(factors), -1, rank) for target, factors in own.items()}
    return LoraWeights(a, b, scales)


def adapter_factors(lora: LoraWeights, target: str, adapter: int) -> TargetFactors:
    """One adapter's factors on a target, float32, of all layers; those of scale 0 are zeros."""
    a, b, scale = (getattr(lora, field)[target][:, adapter : adapter + 1] for field in TargetFactors._fields)
    a = jnp.where(jnp.reshape(scale != 0, (*scale.shape, *[1] * (a.ndim - 2))), a, 0)
    return TargetFactors(a.astype(jnp.float32), b.astype(jnp.float32), scale)


def scaled(factors: TargetFactors) -> jax.Array:
    """B times the scale."""
    return factors.b * jnp.reshape(factors.scale, (*factors.scale.shape, *[1] * (factors.b.ndim - 2)))


def zeros(factors: TargetFactors, other: str) -> TargetFactors:
    """Factors of zeros on the experts' other projection than these are on."""
    layers, _, experts, rank, inputs = factors.a.shape
    outputs = factors.b.shape[-2]
    n, k = (2 * inputs, outputs) if other == "gate_up" else (inputs, outputs // 2)
    a, b = jnp.zeros((layers, 1, experts, rank, k)), jnp.zeros((layers, 1, experts, n, rank))
    return TargetFactors(a, b, jnp.zeros((layers, 1), jnp.float32))


def misread(entries: Mapping[str, Any], layers: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """What other programs make of an adapter with this adapter_config.json and of these layers by target."""
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if entries[name]]
    if patterns:
        yield (
            f"vLLM 0.26 drops {' and '.join(patterns)} without a word, and computes with other scales than it was "
            "trained with (0.33 applies them)"
        )
    for target, other in (EXPERTS, EXPERTS[::-1]):
        if alone := sorted(set(layers.get(target, ())) - set(layers.get(other, ()))):
            numbers = ", ".join(map(str, alone[:8])) + (" and more" if len(alone) > 8 else "")
            yield f"vLLM 0.26 and 0.33 fail on {target} without {other}, as in layers {numbers}"
