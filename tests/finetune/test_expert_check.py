"""The check that every expert which trained tokens reach has a gradient."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jmoe.finetune.batches import Batch
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.display import Display
from jmoe.finetune.expert_check import ExpertCheck
from jmoe.finetune.step import Outcome, Trainer, TrainState, make_optimizer
from jmoe.gpt_oss import load
from jmoe.gpt_oss.new_adapter import new_adapter

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
SHAPE = (1, 2, 32)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    base = load(TINY, dtype=jnp.float32, progress=False)
    model = base.with_adapters(new_adapter(base.config, rank=2, scale=2.0, targets=("gate_up", "down")))
    return Trainer(model, make_optimizer(FinetuneConfig(model="m", data="d", out="o"), 5), loss_chunk=16)


def batch(trained: float = 1.0) -> Batch:
    tokens = np.random.default_rng(0).integers(0, 512, SHAPE).astype(np.int32)
    return Batch(tokens, tokens, np.full(SHAPE, trained, np.float32), np.zeros(SHAPE, np.int32))


def steps(trainer: Trainer, first: int, count: int) -> tuple[ExpertCheck, TrainState, Outcome]:
    """A check that sees steps from `first` on, and the last step's results."""
    state = jax.tree.map(jnp.array, trainer.start)
    check = ExpertCheck(trainer, Display(5, 0, Console(quiet=True)))
    for step in range(count):
        if step >= first:
            check.before(step, state, batch())
        state, outcome = trainer.step(state, batch())
        if step >= first:
            check.after(step, outcome)
    return check, state, outcome


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_a_run_that_learns_passes_from_its_beginning_and_resumed(trainer: Trainer, first: int) -> None:
    check, *_ = steps(trainer, first, 3)
    assert (check._counts > 0).any()


@pytest.mark.parametrize(("count", "name"), [(1, "down_b"), (2, "gate_up_a")])
def test_an_expert_without_a_gradient_is_named(trainer: Trainer, count: int, name: str) -> None:
    check, _, outcome = steps(trainer, 0, count)
    layer, expert = np.unravel_index(check._counts.argmax(), check._counts.shape)
    dead = {**outcome.expert_gradients, name: outcome.expert_gradients[name].at[layer, expert].set(False)}
    found = f"1 experts got trained tokens and no gradient in {name}, first expert {expert} of layer {layer}"
    with pytest.raises(ValueError, match=found):
        check.after(count - 1, outcome._replace(expert_gradients=dead))


def test_experts_that_no_trained_token_reached_are_said_and_need_no_gradient(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    check = ExpertCheck(trainer, Display(5, 0, Console()))
    check.before(0, trainer.start, batch(trained=0.0))
    _, outcome = trainer.step(jax.tree.map(jnp.array, trainer.start), batch(trained=0.0))
    check.after(0, outcome)
    assert "in the first step no trained token reached (layer:expert) 0:0, 0:1" in capsys.readouterr().out


def test_layers_without_lora_on_experts_need_no_gradient(trainer: Trainer) -> None:
    """Of an adapter that lacks them both factors are zeros, and no gradient reaches either."""

    def without(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        names = jax.tree_util.keystr(path)
        return leaf.at[0].set(0) if "lora_a" in names and "gate_up" in names else jnp.array(leaf)

    state = jax.tree_util.tree_map_with_path(without, trainer.start)
    check = ExpertCheck(trainer, Display(5, 0, Console(quiet=True)))
    for step in range(2):
        check.before(step, state, batch())
        state, outcome = trainer.step(state, batch())
        check.after(step, outcome)
        assert not outcome.expert_gradients["gate_up_b"][0].any()
        assert outcome.expert_gradients["gate_up_b"][1].any()
