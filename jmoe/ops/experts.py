"""The weights of one mixture-of-experts layer, and the LoRA adapters on them."""

import dataclasses

import jax
from jaxtyping import Array, Float

from jmoe.ops.exportable import exportable
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """E experts, each y = down @ swiglu(gate_up @ x + gate_up_bias) + down_bias; a pytree.

    gate_up: MXFP4, packed or not, or floating [E, 2I, H]; rows alternate gate, up, gate, up, as gpt-oss stores them.
    gate_up_bias: [E, 2I], rows as above, or None.
    down: MXFP4, packed or not, or floating [E, H, I].
    down_bias: [E, H] or None.
    """

    gate_up: Mxfp4 | PackedMxfp4 | Float[Array, "E 2I H"]
    gate_up_bias: Float[Array, "E 2I"] | None
    down: Mxfp4 | PackedMxfp4 | Float[Array, "E H I"]
    down_bias: Float[Array, "E H"] | None


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
    """A adapters on the experts: W[e] + scale[a] * b[a, e] @ a[a, e] for a token with adapter a; a pytree.

    gate_up_a [A, E, r, H], gate_up_b [A, E, 2I, r], gate_up_scale float32 [A];
    down_a [A, E, r', I], down_b [A, E, H, r'], down_scale float32 [A].
    A scale is alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA, and has no gradient. The three fields of a
    projection without LoRA are None.
    """

    gate_up_a: Float[Array, "A E R H"] | None = None
    gate_up_b: Float[Array, "A E 2I R"] | None = None
    gate_up_scale: Float[Array, " A"] | None = None
    down_a: Float[Array, "A E R I"] | None = None
    down_b: Float[Array, "A E H R"] | None = None
    down_scale: Float[Array, " A"] | None = None


def adapter_count(lora: Lora) -> int:
    """The number of adapters, 0 if no projection has LoRA."""
    scale = lora.gate_up_scale if lora.gate_up_scale is not None else lora.down_scale
    return 0 if scale is None else scale.shape[0]
