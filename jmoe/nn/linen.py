"""The layer for Flax Linen."""

from typing import Any

from flax import linen
from flax.nnx import bridge

from jmoe.nn.moe import MoE
from jmoe.nn.serialization import register_states


def linen_moe(hidden: int, intermediate: int, num_experts: int, *, top_k: int, **options: Any) -> linen.Module:
    """jmoe.nn.MoE as a Linen module: init and apply as usual; options are those of MoE, whose rngs Linen gives.

    Variables stand in collections by their kind: LoRA's in "LoRAParam", frozen weights in "Frozen". flax.serialization
    saves them.
    """
    return bridge.to_linen(MoE, hidden, intermediate, num_experts, top_k=top_k, **options)


register_states()
