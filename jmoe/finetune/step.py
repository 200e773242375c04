"""One step of the optimizer on LoRA's factors, everything else frozen."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from jmoe.finetune.batches import Batch
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.loss import cross_entropy
from jmoe.finetune.on_mesh import OnMesh
from jmoe.finetune.processes import compiled_by_all
from jmoe.gpt_oss.attention import Implementation
from jmoe.gpt_oss.flash_attention import SEGMENTS, segments_a_row, why_not
from jmoe.gpt_oss.lora_dropout import LoraDropout
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.weights import EXPERTS, LoraWeights


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
    """A model split into LoRA's factors and the rest, and the compiled functions of both.

    On a mesh, where the model has a layout, each device computes its own sequences of a step, and losses and gradients
    are summed once at its end.
    """

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
        self.on_mesh = OnMesh.of(model, factors, frozen)
        merge = functools.partial(nnx.merge, graph)
        self._merge: Callable[..., GptOss] = merge
        shardings: dict[str, Any] = {}
        if self.on_mesh is None:
            self.start = TrainState(factors, optimizer.init(factors))
        else:
            lie = TrainState(self.on_mesh.factors, self.on_mesh.of_optimizer(optimizer, factors))
            state, outcome = self.on_mesh.layout.shardings(self.on_mesh.mesh, (lie, P()))
            self.start = TrainState(factors, jax.jit(optimizer.init, out_shardings=state.optimizer)(factors))
            shardings = {"out_shardings": (state, outcome)}
        dropped = LoraDropout.of(dropout, seed)
        self._step = jax.jit(
            functools.partial(take_step, merge, optimizer, self.on_mesh, loss_chunk, dropped),
            donate_argnums=0,
            static_argnames="attention",
            **shardings,
        )

        def loss(factors: Any, frozen: Any, batch: Batch, attention: Attention) -> Array:
            def of_device(factors: Any, frozen: Any, batch: Batch) -> Array:
                return loss_of(merge(factors, frozen), batch, loss_chunk, attention)

            of_all = of_device if self.on_mesh is None else self.on_mesh.sum_loss(of_device)
            return of_all(factors, frozen, batch)

        self._step_by_all = compiled_by_all(self._step)
        self._loss = compiled_by_all(jax.jit(loss, static_argnames="attention"))

    def model(self, state: TrainState) -> GptOss:
        """The model with the factors of this state."""
        return self._merge(state.factors, self.frozen)

    def adapter(self, state: TrainState) -> LoraWeights:
        """The adapter of this state, of numpy arrays; on a mesh of several processes all take part."""
        lora = self.model(state).lora
        assert lora is not None
        return jax.tree.map(self.on_host, lora)

    def on_host(self, array: Array) -> np.ndarray:
        """An array of the model's devices, all of it; on a mesh of several processes all take part."""
        return np.asarray(array if self.on_mesh is None else self.on_mesh.whole(array))

    def step(self, state: TrainState, batches: Batch) -> tuple[TrainState, Outcome]:
        """(the next state, what happened) on N batches, of arrays [N, B, T]; the state given is used up.

        Raises:
          ValueError: on a mesh, whose devices B does not divide among.
        """
        return self._step_by_all(state, self.frozen, self.put(batches), attention=self.attention_for(batches))

    def loss(self, state: TrainState, batch: Batch) -> Float[Array, ""]:
        """The sum of the losses of one batch, whose arrays are [B, T]; errors as in `step`."""
        return self._loss(state.factors, self.frozen, self.put(batch), attention=self.attention_for(batch))

    def compile(self, state: TrainState, batches: Batch) -> jax.stages.Compiled:
        """`step`, compiled for arrays like these: for its memory and cost."""
        attention = self.attention_for(batches)
        return self._step.lower(state, self.frozen, self.put(batches), attention=attention).compile()

    def put(self, batch: Batch) -> Batch:
        """The batch where the compiled functions want it: on the mesh, if there is one."""
        return batch if self.on_mesh is None else self.on_mesh.put(batch)


def take_step(
    merge: Callable[..., GptOss],
    optimizer: optax.GradientTransformation,
    on_mesh: OnMesh | None,
    chunk: int,
    dropout: LoraDropout | None,
    state: TrainState,
    frozen: Any,
    batches: Batch,
    attention: Attention,
) -> tuple[TrainState, Outcome]:
    """One step on the mean loss over all trained tokens of N batches, one after another."""
    tokens = batches.weights.sum()
    # What is left out follows from the number of the step, which the optimizer counts, and of the micro-batch.
    count = batches.tokens.shape[0]
    dropouts = None if dropout is None else dropout.number(steps_taken(state.optimizer)).numbers(count)

    def gradient_of(factors: Any, frozen: Any, batches: Batch, rest: tuple[Array, LoraDropout | None]) -> Any:
        tokens, dropouts = rest

        def mean_loss(factors: Any, batch: Batch, dropout: LoraDropout | None) -> Array:
            return loss_of(merge(factors, frozen), batch, chunk, attention, dropout) / jnp.maximum(tokens, 1)

        return sum_over_micro_batches(mean_loss, factors, batches, dropouts)

    of_all = gradient_of if on_mesh is None else on_mesh.sum_gradient(gradient_of)
    loss, gradient = of_all(state.factors, frozen, batches, (tokens, dropouts))
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


def sum_over_micro_batches(
    loss: Callable[[Any, Batch, LoraDropout | None], Array], factors: Any, batches: Batch, dropouts: LoraDropout | None
) -> tuple[Float[Array, ""], Any]:
    """(the sum of the losses of N batches, its gradient in the factors), one batch after another."""

    def add(total: tuple[Array, Any], part: tuple[Batch, LoraDropout | None]) -> tuple[tuple[Array, Any], None]:
        one = jax.value_and_grad(loss)(factors, *part)
        return jax.tree.map(jnp.add, total, one), None

    if batches.tokens.shape[0] == 1:
        only = jax.tree.map(lambda array: array[0], (batches, dropouts))
        return jax.value_and_grad(loss)(factors, *only)
    nothing = jnp.float32(0), jax.tree.map(jnp.zeros_like, factors)
    return lax.scan(add, nothing, (batches, dropouts))[0]


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
