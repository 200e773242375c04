"""The choice of experts for each token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.ops.check import as_count, check_array
from jmoe.ops.exportable import exportable
from jmoe.triton_src.scoring import Scoring, not_a_scoring


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Which experts each token uses, and with which weights; a pytree.

    experts: int32 [..., k], best first. weights: float32 [..., k]. Leading axes are those of the tokens.
    """

    experts: Int32[Array, "... k"]
    weights: Float[Array, "... k"]


def route(
    router_logits: Float[Array, "... E"],
    top_k: int,
    *,
    scoring: Scoring = Scoring(),
    choice_bias: Float[Array, " E"] | None = None,
) -> Routing:
    """The top_k experts of each token, and their weights: unless told otherwise the softmax over their logits alone.

    Equal ones go to the lower expert. NaN counts as infinity, so that it is chosen and its token's weights are NaN.

    Args:
      scoring: which function makes weights of logits; see jmoe.Scoring.
      choice_bias: bfloat16 or float32, added to the scores for the choice alone, as DeepSeek-V3 does; no gradient.

    Raises:
      ValueError: top_k is not an integer between 1 and E, the logits or choice_bias are not bfloat16 or float32, or
        choice_bias has another size.
    """
    if not hasattr(router_logits, "dtype") or jnp.ndim(router_logits) < 1:
        raise ValueError(f"router_logits must be an array of rank 1 or more [..., E], got {router_logits!r}")
    top_k = as_count("top_k", top_k, router_logits.shape[-1])
    check_array("router_logits", router_logits)
    if not isinstance(scoring, Scoring):
        raise ValueError(not_a_scoring(scoring))
    logits = router_logits.astype(jnp.float32)
    if choice_bias is None:
        best = logits
    else:
        check_array("choice_bias", choice_bias, (router_logits.shape[-1],))
        best = _scores(logits, scoring) + lax.stop_gradient(choice_bias).astype(jnp.float32)
    order = jnp.where(jnp.isnan(best), jnp.inf, jnp.where(best == 0, 0.0, best))  # -0 and 0 are equal
    _, experts = lax.top_k(lax.stop_gradient(order), top_k)
    if scoring.of_chosen_logits and choice_bias is None:
        weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1), axis=-1)
    elif scoring.renormalize:
        # By logarithms: scores may be so small that the square of their sum, in its derivative, is zero.
        log = jax.nn.log_softmax(logits, axis=-1) if scoring.function == "softmax" else jax.nn.log_sigmoid(logits)
        chosen = jnp.take_along_axis(log, experts, axis=-1)
        total = jax.nn.logsumexp(chosen, axis=-1, keepdims=True)
        weights = jnp.exp(chosen - jnp.logaddexp(total, math.log(LEAST_SUM)))
    else:
        weights = jnp.take_along_axis(_scores(logits, scoring), experts, axis=-1)
    return Routing(experts, weights if scoring.scale == 1 else weights * scoring.scale)


LEAST_SUM = 1e-20
"""What is added to a sum of scores that divides, as DeepSeek does: all of them may be zeros."""


def _scores(logits: Float[Array, "... E"], scoring: Scoring) -> Float[Array, "... E"]:
    return jax.nn.softmax(logits, axis=-1) if scoring.function == "softmax" else jax.nn.sigmoid(logits)
