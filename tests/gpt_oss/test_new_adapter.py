"""Adapters to train, and how many tokens reach each expert."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.gpt_oss import load
from jmoe.gpt_oss.expert_counts import expert_counts
from jmoe.gpt_oss.new_adapter import new_adapter

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"


def test_a_new_adapter_changes_nothing_yet() -> None:
    model = load(TINY, dtype=jnp.float32, progress=False)
    adapted = model.with_adapters(new_adapter(model.config, rank=3, scale=2.0))
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    np.testing.assert_array_equal(adapted(tokens), model(tokens))
    assert adapted.lora is not None
    assert adapted.lora.a["gate_up"].shape == (2, 1, 8, 3, 128)
    assert adapted.lora.b["q"].shape == (2, 1, 256, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapted.lora)} == {jnp.dtype("float32")}


def test_factors_have_the_spread_of_pefts() -> None:
    config = load(TINY, progress=False).config
    a = np.asarray(new_adapter(config, rank=16, scale=1.0, targets=("down",)).a["down"])
    assert np.abs(a).max() <= 1 / np.sqrt(160)
    assert a.std() == pytest.approx(1 / np.sqrt(3 * 160), rel=0.02)


@pytest.mark.parametrize(("rank", "targets"), [(0, ("q",)), (2, ()), (2, ("q", "head"))])
def test_what_would_train_nothing_is_refused(rank: int, targets: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        new_adapter(load(TINY, progress=False).config, rank=rank, scale=1.0, targets=targets)


def test_counts_are_of_counted_tokens_and_of_every_layer() -> None:
    model = load(TINY, dtype=jnp.float32, progress=False)
    tokens = jnp.arange(40, dtype=jnp.int32).reshape(2, 20)
    everything = expert_counts(model, tokens, counted=jnp.ones_like(tokens, bool))
    assert everything.sum(axis=1).tolist() == [40 * 4, 40 * 4]
    first = jnp.zeros_like(tokens, bool).at[0].set(True)
    of_first = expert_counts(model, tokens, counted=first)
    np.testing.assert_array_equal(of_first, expert_counts(model, tokens[:1], counted=first[:1]))
    assert of_first.sum(axis=1).tolist() == [20 * 4, 20 * 4]


def test_each_target_may_have_a_rank_and_a_scale_of_its_own() -> None:
    config = load(TINY, progress=False).config
    mixed = new_adapter(config, rank={"q": 2, "down": 5}, scale={"q": 4.0, "down": 1.0}, targets=("down", "q"), seed=3)
    assert {name: a.shape[-2] for name, a in mixed.a.items()} == {"q": 2, "down": 5}
    assert {name: float(scale[0, 0]) for name, scale in mixed.scale.items()} == {"q": 4.0, "down": 1.0}
    same = new_adapter(config, rank={"q": 2, "down": 2}, scale=1.0, targets=("q", "down"), seed=3)
    for one, other in zip(
        jax.tree.leaves(same),
        jax.tree.leaves(new_adapter(config, rank=2, scale=1.0, targets=("q", "down"), seed=3)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="rank must have a value for each target, got none for down"):
        new_adapter(config, rank={"q": 2}, scale=1.0, targets=("q", "down"))
