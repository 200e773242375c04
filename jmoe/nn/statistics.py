"""How a router spreads tokens over its experts."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jmoe.ops.routing import LEAST_SUM, Routing
from jmoe.triton_src.scoring import Scoring


@struct.dataclass
class RouterStatistics:
    """Of one call of a layer.

    routing: the choice itself, to replay.
    load_balancing_loss: experts * sum over experts of the share of pairs they got times the mean probability they had:
      1 where both are uniform, more where they gather (Switch Transformers, arXiv 2101.03961, equation 4, for top-k).
      To be added to the loss, multiplied by 0.01 or so. Its gradient is in the probabilities.
    tokens_per_expert: float32 [E], pairs that each expert got; their sum is tokens * top_k.
    largest_share: of all pairs, what the fullest expert got.
    entropy: of the mean probabilities, in nats; log(E) where they are uniform.
    """

    routing: Routing
    load_balancing_loss: Float[Array, ""]
    tokens_per_expert: Float[Array, " E"]
    largest_share: Float[Array, ""]
    entropy: Float[Array, ""]


def router_statistics(
    router_logits: Float[Array, "... E"], routing: Routing, scoring: Scoring = Scoring()
) -> RouterStatistics:
    """The statistics of a router's choice; of no tokens, NaN where there is a mean.

    Of a scoring by sigmoids, probabilities are each token's scores divided by their sum, as DeepSeek-V3 has them.
    """
    experts = router_logits.shape[-1]
    chosen = routing.experts
    # Sums over axes as they are, which a mesh may split.
    counts = jnp.sum(jax.nn.one_hot(chosen, experts, dtype=jnp.float32), axis=tuple(range(chosen.ndim)))
    shares = counts / chosen.size if chosen.size else counts * jnp.nan
    probabilities = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    if scoring.function == "sigmoid":
        scores = jax.nn.sigmoid(router_logits.astype(jnp.float32))
        probabilities = scores / (jnp.sum(scores, axis=-1, keepdims=True) + LEAST_SUM)
    mean = jnp.mean(probabilities, axis=tuple(range(router_logits.ndim - 1)))
    return RouterStatistics(
        routing=routing,
        load_balancing_loss=experts * jnp.sum(jax.lax.stop_gradient(shares) * mean),
        tokens_per_expert=counts,
        largest_share=jnp.max(shares),
        entropy=-jnp.sum(jax.scipy.special.xlogy(mean, mean)),
    )
