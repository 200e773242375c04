"""One step of the optimizer on LoRA's factors, everything else frozen."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from jmoe.finetune.batches import Batch
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.loss import cross_entropy
from jmoe.gpt_oss.attention import Implementation
from jmoe.gpt_oss.flash_attention import SEGMENTS, segments_a_row, why_not
from jmoe.gpt_oss.lora_dropout import LoraDropout
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.weights import EXPERTS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes; a pytree.

    factors: the nnx.State of the model's nnx.LoRAParam, float32.
    optimizer: optax's state.
    """

    factors: Any
    optimizer: Any


class Outcome(NamedTuple):
    """Of one step.

    loss: mean over the trained tokens.
    gradient_norm: of all factors, before clipping.
    tokens: trained ones.
    finite: whether loss and norm are; otherwise the state is as before.
    expert_gradients: "gate_up_a", ... -> bool [L, E], whether any of an expert's gradient was not zero.
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    tokens: Float[Array, ""]
    finite: Bool[Array, ""]
    expert_gradients: dict[str, Bool[Array, "L E"]]


def learning_rate(config: FinetuneConfig, steps: int) -> optax.Schedule:
    """The rate of each of so many steps: a linear rise, then the configuration's fall to zero."""
    rise = round(config.warmup * steps)
    fall = max(1, steps - rise)
    after = {
        "cosine": optax.cosine_decay_schedule(config.learning_rate, fall),
        "linear": optax.linear_schedule(config.learning_rate, 0, fall),
        "constant": optax.constant_schedule(config.learning_rate),
    }[config.schedule]
    # The first step of a rise from zero would change nothing.
    rising = optax.linear_schedule(config.learning_rate / (rise + 1), config.learning_rate, max(1, rise))
    return optax.join_schedules([rising, after], [rise])


def make_optimizer(config: FinetuneConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the norm of all factors together."""
    clip = optax.clip_by_global_norm(config.clip) if config.clip > 0 else optax.identity()
    rate = learning_rate(config, steps)
    return optax.chain(clip, optax.adamw(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay))


class Attention(NamedTuple):
    """What jmoe.gpt_oss.GptOss.hidden is told of attention, by its names."""

    attention: Implementation
    most_segments: int = SEGMENTS


MANY_SEGMENTS = 128
"""A row, on average: the most for which FlashAttention is taken. In rows of 4096 tokens they are 32 tokens long."""


def attention_for(dtype: DTypeLike, width: int, batch: Batch) -> Attention:
    """Which attention heads of this width take for arrays [..., B, T]: known on the host, so that one is compiled."""
    rows = batch.segment_ids.reshape(-1, *batch.segment_ids.shape[-2:])
    most = max(map(segments_a_row, rows))
    if jax.default_backend() == "gpu" and why_not([dtype], width) is None and most <= MANY_SEGMENTS:
        return Attention("flash", SEGMENTS if most <= SEGMENTS else MANY_SEGMENTS)
    return Attention("xla")


def loss_of(
    model: GptOss, batch: Batch, chunk: int, attention: Attention, dropout: LoraDropout | None = None
) -> Float[Array, ""]:
    """The sum of one batch's losses; its arrays are [B, T]."""
    hidden = model.hidden(
        jnp.asarray(batch.tokens),
        segment_ids=jnp.asarray(batch.segment_ids),
        dropout=dropout,
        **attention._asdict(),
    )
    return cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        model.head.get_value(),
        jnp.asarray(batch.targets).reshape(-1),
        jnp.asarray(batch.weights).reshape(-1),
        chunk,
    )


class Trainer:
    """A model split into LoRA's factors and the rest, and the compiled functions of both."""

    def __init__(
        self,
        model: GptOss,
        optimizer: optax.GradientTransformation,
        *,
        loss_chunk: int,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Splits the model.

        Args:
          dropout: chance that an input of LoRA on attention is left out of a step; it acts in `step` alone.
          seed: of what is left out, which follows from it and the step's number.

        Raises:
          ValueError: the model has no adapter, and so nothing to train.
        """
        if model.lora is None:
            raise ValueError("the model has no adapter: there is nothing to train")
        graph, factors, frozen = nnx.split(model, nnx.LoRAParam, ...)  # type: ignore[misc]
        self.config = model.config
        self.attention_for = functools.partial(attention_for, model.dtype, model.config.head_dim)
        self.frozen = frozen
        self.start = TrainState(factors, optimizer.init(factors))
        merge = functools.partial(nnx.merge, graph)
        self._merge: Callable[..., GptOss] = merge
        self._step = jax.jit(
            functools.partial(take_step, merge, optimizer, loss_chunk, LoraDropout.of(dropout, seed)),
            donate_argnums=0,
            static_argnames="attention",
        )

        def loss(factors: Any, frozen: Any, batch: Batch, attention: Attention) -> Array:
            return loss_of(merge(factors, frozen), batch, loss_chunk, attention)

        self._loss = jax.jit(loss, static_argnames="attention")

    def model(self, state: TrainState) -> GptOss:
        """The model with the factors of this state."""
        return self._merge(state.factors, self.frozen)

    def step(self, state: TrainState, batches: Batch) -> tuple[TrainState, Outcome]:
        """(the next state, what happened) on N batches, of arrays [N, B, T]; the state given is used up."""
        return self._step(state, self.frozen, batches, attention=self.attention_for(batches))

    def loss(self, state: TrainState, batch: Batch) -> Float[Array, ""]:
        """The sum of the losses of one batch, whose arrays are [B, T]."""
        return self._loss(state.factors, self.frozen, batch, attention=self.attention_for(batch))

    def compile(self, state: TrainState, batches: Batch) -> jax.stages.Compiled:
        """`step`, compiled for arrays like these: for its memory and cost."""
        return self._step.lower(state, self.frozen, batches, attention=self.attention_for(batches)).compile()


def take_step(
    merge: Callable[..., GptOss],
    optimizer: optax.GradientTransformation,
    chunk: int,
    dropout: LoraDropout | None,
    state: TrainState,
    frozen: Any,
    batches: Batch,
    attention: Attention,
) -> tuple[TrainState, Outcome]:
    """One step on the mean loss over all trained tokens of N batches, one after another."""
    tokens = batches.weights.sum()
    micro_batches = batches.tokens.shape[0]
    # What is left out follows from the number of the step, which the optimizer counts, and of the micro-batch.
    dropouts = None if dropout is None else dropout.number(steps_taken(state.optimizer)).numbers(micro_batches)

    def mean_loss(factors: Any, batch: Batch, dropout: LoraDropout | None) -> Array:
        return loss_of(merge(factors, frozen), batch, chunk, attention, dropout) / jnp.maximum(tokens, 1)

    def add(total: tuple[Array, Any], part: tuple[Batch, LoraDropout | None]) -> tuple[tuple[Array, Any], None]:
        one = jax.value_and_grad(mean_loss)(state.factors, *part)
        return jax.tree.map(jnp.add, total, one), None

    if micro_batches == 1:
        only = jax.tree.map(lambda array: array[0], (batches, dropouts))
        loss, gradient = jax.value_and_grad(mean_loss)(state.factors, *only)
    else:
        nothing = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.factors)
        (loss, gradient), _ = lax.scan(add, nothing, (batches, dropouts))
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies its count of steps, int32, by floats
        updates, moved = optimizer.update(gradient, state.optimizer, state.factors)
        changed = optax.apply_updates(state.factors, updates), moved
    factors, kept = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), changed, (state.factors, state.optimizer)
    )
    outcome = Outcome(loss, norm, tokens, finite, experts_not_zero(merge(gradient, frozen)))
    return TrainState(factors, kept), outcome


def steps_taken(optimizer: Any) -> Int32[Array, ""]:
    """How many steps an optimizer's state has seen."""
    return optax.tree.get_all_with_path(optimizer, "count")[0][1]


def experts_not_zero(model: GptOss) -> dict[str, Bool[Array, "L E"]]:
    """Which experts' factors are not all zero; of gradients, if the model holds them in place of factors."""
    lora = model.lora
    assert lora is not None
    return {
        f"{name}_{part}": jnp.any(factors[name] != 0, axis=(1, 3, 4))
        for name in EXPERTS
        for part, factors in (("a", lora.a), ("b", lora.b))
        if name in factors
    }
