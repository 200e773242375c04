"""How many tokens each expert is given."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jmoe.gpt_oss.attention import Implementation
from jmoe.gpt_oss.flash_attention import SEGMENTS
from jmoe.gpt_oss.model import GptOss, attentions_within, positions_in_segments
from jmoe.ops.routing import route


def expert_counts(
    model: GptOss,
    tokens: Int32[Array, "B T"],
    *,
    counted: Bool[Array, "B T"],
    segment_ids: Int32[Array, "B T"] | None = None,
    adapter_ids: Int32[Array, "B T"] | None = None,
    attention: Implementation = None,
    most_segments: int = SEGMENTS,
) -> Int32[Array, "L E"]:
    """Of the tokens `counted`, how many chose each expert of each layer; the other arguments as in GptOss.hidden."""
    config = model.config

    def observe(router_logits: Array, state: Array, group: Array) -> Array:
        chosen = route(router_logits.reshape(-1, config.num_local_experts), config.num_experts_per_tok).experts
        ones = jnp.broadcast_to(counted.reshape(-1, 1), chosen.shape).astype(jnp.int32)
        return state.at[group, chosen].add(ones)

    groups = config.num_hidden_layers // model.period
    nothing = jnp.zeros((groups, config.num_local_experts), jnp.int32)
    _, counts = model.run_layers(
        tokens,
        positions_in_segments(tokens.shape, segment_ids),
        adapter_ids,
        attentions_within(config, segment_ids, attention, most_segments),
        [nothing] * model.period,
        observe=observe,
    )
    return jnp.stack(counts, axis=1).reshape(config.num_hidden_layers, config.num_local_experts)
