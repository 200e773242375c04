"""The choice of experts for each token."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.ops.check import as_count, check_array
from jmoe.ops.exportable import exportable


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Which experts each token uses, and with which weights; a pytree.

    experts: int32 [..., k], best first. weights: float32 [..., k]. Leading axes are those of the tokens.
    """

    experts: Int32[Array, "... k"]
    weights: Float[Array, "... k"]


def route(router_logits: Float[Array, "... E"], top_k: int) -> Routing:
    """The top_k experts of each token, and the softmax over their logits alone, as gpt-oss does.

    Equal logits go to the lower expert. NaN counts as infinity, so that it is chosen and its token's weights are NaN.

    Raises:
      ValueError: top_k is not an integer between 1 and E, or the logits are not bfloat16 or float32.
    """
    if not hasattr(router_logits, "dtype") or jnp.ndim(router_logits) < 1:
        raise ValueError(f"router_logits must be an array of rank 1 or more [..., E], got {router_logits!r}")
    top_k = as_count("top_k", top_k, router_logits.shape[-1])
    check_array("router_logits", router_logits)
    logits = router_logits.astype(jnp.float32)
    order = jnp.where(jnp.isnan(logits), jnp.inf, jnp.where(logits == 0, 0.0, logits))  # -0 and 0 are equal
    _, experts = lax.top_k(lax.stop_gradient(order), top_k)
    weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1), axis=-1)
    return Routing(experts, weights)
