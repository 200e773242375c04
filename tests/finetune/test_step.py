"""One step of the optimizer on the tiny model."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jmoe.bench.model.case import sizes
from jmoe.finetune.batches import Batch
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.step import Attention, Trainer, TrainState, attention_for, learning_rate, make_optimizer, steps_taken
from jmoe.gpt_oss import GptOss, flash_attention, load
from jmoe.gpt_oss.config import alternating
from jmoe.gpt_oss.new_adapter import new_adapter
from jmoe.gpt_oss.random_model import random_model

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
CONFIG = FinetuneConfig(model="m", data="d", out="o", learning_rate=1e-2, warmup=0.0, schedule="constant")


def model(scale: float = 2.0) -> GptOss:
    base = load(TINY, dtype=jnp.float32, progress=False)
    return base.with_adapters(new_adapter(base.config, rank=2, scale=scale))


def random_batch(micro_batches: int, rows: int = 2, length: int = 12, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (micro_batches, rows, length)
    segments = np.repeat(np.array([1, 2], np.int32), length // 2) * np.ones(shape, np.int32)
    weights = (rng.random(shape) < 0.8).astype(np.float32)
    return Batch(
        rng.integers(0, 512, shape).astype(np.int32), rng.integers(0, 512, shape).astype(np.int32), weights, segments
    )


@functools.cache
def trainer() -> Trainer:
    """Compiled once for all tests, which step from copies of its state."""
    return Trainer(model(), make_optimizer(CONFIG, 10), loss_chunk=16)


@functools.cache
def dropping() -> Trainer:
    """As trainer(), with dropout."""
    return Trainer(model(), make_optimizer(CONFIG, 10), loss_chunk=16, dropout=0.3, seed=1)


def started() -> TrainState:
    """A state of theirs in which B is no longer zero, so that what A sees matters."""
    return trainer().step(copy(trainer().start), random_batch(1))[0]


def copy(state: TrainState) -> TrainState:
    """A step uses its state up."""
    return jax.tree.map(jnp.array, state)


@pytest.mark.slow
def test_the_loss_is_the_mean_over_trained_tokens() -> None:
    one, batch = trainer(), random_batch(1)
    logits = one.model(one.start)(batch.tokens[0], segment_ids=batch.segment_ids[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets[0])
    wanted = float((losses * batch.weights[0]).sum() / batch.weights.sum())
    _, outcome = one.step(copy(one.start), batch)
    assert float(outcome.loss) == pytest.approx(wanted, rel=1e-5)
    assert float(outcome.tokens) == batch.weights.sum()


@pytest.mark.slow
def test_accumulated_batches_are_one_large_batch() -> None:
    one, batch = trainer(), random_batch(3)
    together = Batch(*(array.reshape(1, -1, array.shape[-1]) for array in batch))
    apart, outcome_apart = one.step(copy(one.start), batch)
    whole, outcome_whole = one.step(copy(one.start), together)
    assert float(outcome_apart.loss) == pytest.approx(float(outcome_whole.loss), rel=1e-5)
    assert float(outcome_apart.gradient_norm) == pytest.approx(float(outcome_whole.gradient_norm), rel=1e-4)
    assert jax.tree.structure(apart) == jax.tree.structure(whole)


def test_steps_lower_the_loss_and_change_factors_alone() -> None:
    one, batch = trainer(), random_batch(1)
    frozen = jax.tree.map(np.asarray, jax.tree.leaves(one.frozen))
    state, first = one.step(copy(one.start), batch)
    for _ in range(5):
        state, last = one.step(state, batch)
    assert float(last.loss) < float(first.loss) - 0.1
    assert all(map(np.array_equal, frozen, jax.tree.leaves(one.frozen)))
    assert all(variable.dtype == jnp.float32 for variable in jax.tree.leaves(state.factors))


def test_experts_with_trained_tokens_have_gradients_in_b_and_not_yet_in_a() -> None:
    one = trainer()
    state, first = one.step(copy(one.start), random_batch(1))
    _, second = one.step(state, random_batch(1))
    assert set(first.expert_gradients) == {"gate_up_a", "gate_up_b", "down_a", "down_b"}
    assert first.expert_gradients["down_b"].shape == (2, 8)
    assert not first.expert_gradients["gate_up_a"].any()
    assert jnp.array_equal(second.expert_gradients["gate_up_a"], second.expert_gradients["gate_up_b"])


@pytest.mark.slow
def test_dropout_is_of_the_step() -> None:
    state, batch = started(), random_batch(1, seed=2)
    once, first = dropping().step(copy(state), batch)
    again, second = dropping().step(copy(state), batch)
    assert all(map(np.array_equal, jax.tree.leaves(once), jax.tree.leaves(again)))
    assert float(first.loss) == float(second.loss) != float(trainer().step(copy(state), batch)[1].loss)
    assert int(steps_taken(state.optimizer)) == 1
    later = TrainState(state.factors, jax.tree.map(lambda leaf: leaf + 1 if leaf.ndim == 0 else leaf, state.optimizer))
    assert float(dropping().step(copy(later), batch)[1].loss) != float(first.loss)


@pytest.mark.slow
def test_batches_of_one_step_leave_out_different_values() -> None:
    batch = random_batch(1)
    twice = Batch(*(np.concatenate([array, array]) for array in batch))
    _, one = dropping().step(copy(started()), batch)
    _, two = dropping().step(copy(started()), twice)
    assert float(one.loss) != float(two.loss)
    assert float(one.loss) == pytest.approx(float(two.loss), rel=0.2)


def test_validation_has_no_dropout() -> None:
    state, batch = started(), Batch(*(array[0] for array in random_batch(1)))
    assert float(dropping().loss(state, batch)) == float(trainer().loss(state, batch))


def test_without_dropout_a_step_has_no_random_numbers() -> None:
    def program(one: Trainer) -> str:
        return one._step.lower(one.start, one.frozen, random_batch(1), attention=Attention("xla")).as_text()

    assert "threefry" in program(dropping())
    assert "threefry" not in program(trainer())


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    one, batch = Trainer(model(float("nan")), make_optimizer(CONFIG, 10), loss_chunk=16), random_batch(1)
    state, outcome = one.step(copy(one.start), batch)
    assert not bool(outcome.finite)
    assert all(map(np.array_equal, jax.tree.leaves(one.start), jax.tree.leaves(state)))


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        Trainer(load(TINY, progress=False), make_optimizer(CONFIG, 10), loss_chunk=16)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_falls_and_is_never_zero(schedule: str) -> None:
    config = dataclasses.replace(CONFIG, schedule=schedule, warmup=0.2)
    rates = [float(learning_rate(config, 20)(step)) for step in range(20)]
    assert rates[0] > 0
    assert rates[:4] == sorted(rates[:4])
    assert max(rates) == pytest.approx(config.learning_rate)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert min(rates) > 0


def test_factors_are_variables_of_flax() -> None:
    assert len(jax.tree.leaves(nnx.state(model(), nnx.LoRAParam))) == 12


def test_layers_computed_again_keep_no_weights_for_the_backward_pass() -> None:
    config = dataclasses.replace(sizes()["tiny"], num_hidden_layers=4, layer_types=alternating(4), hidden_size=96)
    base = random_model(config, packed=False, remat="layers")
    one = Trainer(base.with_adapters(new_adapter(config, rank=2, scale=2.0)), make_optimizer(CONFIG, 10), loss_chunk=16)
    program = one._step.lower(one.start, one.frozen, random_batch(1), attention=Attention("xla")).as_text()
    qkv, o = "512x96", "96x256"
    assert f"tensor<4x{qkv}xbf16>" in program, "the stack itself"
    # In two groups of two layers, the backward pass would have a stack of each layer of a group.
    assert f"tensor<2x{qkv}" not in program
    assert f"tensor<2x{o}" not in program


@pytest.mark.parametrize(
    ("segments", "wanted"),
    [
        (1, Attention("flash", 32)),
        (32, Attention("flash", 32)),
        (33, Attention("flash", 128)),
        (128, Attention("flash", 128)),
        (129, Attention("xla")),
    ],
)
def test_flash_is_for_batches_whose_segments_fit(
    segments: int, wanted: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attention, "available", lambda: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ids = np.zeros((3, 2, 256), np.int32)
    ids[1] = np.minimum(np.arange(256), segments - 1)
    batch = random_batch(3)._replace(segment_ids=ids)
    assert attention_for(jnp.bfloat16, 64, batch) == wanted
    assert attention_for(jnp.bfloat16, 64, batch._replace(segment_ids=ids[0])) == Attention("flash", 32)
    assert attention_for(jnp.float32, 64, batch) == Attention("xla")
    monkeypatch.setattr(flash_attention, "available", lambda: "it is not there")
    assert attention_for(jnp.bfloat16, 64, batch) == Attention("xla")
