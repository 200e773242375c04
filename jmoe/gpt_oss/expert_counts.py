"""How many tokens each expert is given."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jmoe.gpt_oss.attention import Implementation
from jmoe.gpt_oss.flash_attention import SEGMENTS
from jmoe.gpt_oss.layer import Place
from jmoe.gpt_oss.model import AttentionWithin, GptOss, positions_in_segments
from jmoe.gpt_oss.run import Inputs
from jmoe.gpt_oss.split import Split
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
    groups = config.num_hidden_layers // model.period
    nothing = jnp.zeros((groups, config.num_local_experts), jnp.int32)
    counting = CountingAttention(
        config.windows, segment_ids, attention, most_segments, counted=counted, top_k=config.num_experts_per_tok
    )
    inputs = Inputs(tokens, positions_in_segments(tokens.shape, segment_ids), adapter_ids)
    _, counts = model.run_layers(inputs, counting, (nothing,) * model.period)
    return jnp.stack(counts, axis=1).reshape(config.num_hidden_layers, config.num_local_experts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CountingAttention(AttentionWithin):
    """Attention that carries counts [groups, E] of the experts that the tokens `counted` chose."""

    counted: Bool[Array, "B T"]
    top_k: int = dataclasses.field(metadata={"static": True})

    def observe(self, router_logits: Array, state: Array, place: Place) -> Array:
        """The counts with one layer's."""
        chosen = route(router_logits.reshape(-1, router_logits.shape[-1]), self.top_k).experts
        ones = jnp.broadcast_to(self.counted.reshape(-1, 1), chosen.shape).astype(jnp.int32)
        return state.at[place.group, chosen].add(ones)

    def finish(self, states: tuple[Array, ...], split: Split) -> tuple[Array, ...]:
        """The counts of all devices' tokens."""
        return tuple(map(split.sum_over_batch, states))
