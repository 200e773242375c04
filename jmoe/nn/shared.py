"""Experts that every token uses, beside those that the router chooses."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jmoe.nn.variables import Frozen
from jmoe.ops.check import check_array, check_experts
from jmoe.ops.experts import Experts
from jmoe.ops.mesh_axes import MeshAxes
from jmoe.ops.moe import moe
from jmoe.ops.routing import Routing


class SharedExperts(nnx.Module):
    """The sum of S experts on every token, each weighted by the sigmoid of its gate or by 1.

    One of the size of several is several without gates, as DeepSeek-V3 has them; Qwen2-MoE has one with a gate.
    Variables: `gate_up`, `gate_up_bias`, `down`, `down_bias` as in jmoe.Experts, and `gate` [H, S].
    """

    def __init__(
        self, experts: Experts, gate: Float[Array, "H S"] | None, hidden: int, train: bool, **options: Any
    ) -> None:
        """Options are those of jmoe.moe.

        Args:
          train: the variables are nnx.Param; else Frozen.

        Raises:
          ValueError: the arrays do not fit together, or x of inner size `hidden`.
        """
        self.count, of_experts, _ = check_experts(experts)
        if of_experts != hidden:
            raise ValueError(f"shared experts must have the layer's H = {hidden}, got {of_experts}")
        if gate is not None:
            check_array("shared_gate", gate, (hidden, self.count))
        kind = nnx.Param if train else Frozen
        self.gate = None if gate is None else nnx.data(kind(gate))
        for name in ("gate_up", "gate_up_bias", "down", "down_bias"):
            value = getattr(experts, name)
            setattr(self, name, None if value is None else nnx.data(kind(value)))
        axes = options.get("mesh_axes")
        self.options = options | {"mesh_axes": axes and MeshAxes(tokens=axes.tokens)}  # every device has them whole

    @property
    def experts(self) -> Experts:
        """The experts' weights."""
        names = ("gate_up", "gate_up_bias", "down", "down_bias")
        variables = {name: getattr(self, name) for name in names}
        values: dict[str, Any] = {n: None if v is None else v.get_value() for n, v in variables.items()}
        return Experts(**values)

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        """y like x. Raises as jmoe.moe does."""
        ones = jnp.ones_like(x[..., :1], jnp.float32)
        if self.gate is None:
            weights = jnp.broadcast_to(ones, (*x.shape[:-1], self.count))
        else:
            gate = self.gate.get_value().astype(x.dtype)
            logits = jnp.matmul(x, gate, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
            weights = jax.nn.sigmoid(logits)
        experts = ones.astype(jnp.int32) * jnp.arange(self.count, dtype=jnp.int32)
        return moe(x, None, self.experts, top_k=self.count, routing=Routing(experts, weights), **self.options)
