"""Dropout of the inputs of LoRA on attention: what is left out, when, and that nothing else changes."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.gpt_oss import GptOss, load
from jmoe.gpt_oss.attention_lora import AttentionLora, ProductLora
from jmoe.gpt_oss.layer import Remat, shrink
from jmoe.gpt_oss.lora_dropout import LoraDropout, shrink_dropped
from jmoe.gpt_oss.weights import LoraWeights

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)


@functools.cache
def adapted(remat: Remat = "nothing") -> GptOss:
    return load(TINY, adapter=TINY / "adapter", dtype=jnp.float32, progress=False, remat=remat)


def dropout(rate: float = 0.3, seed: int = 0) -> LoraDropout:
    made = LoraDropout.of(rate, seed)
    assert made is not None
    return made


def test_no_rate_is_no_dropout() -> None:
    assert LoraDropout.of(0.0, 3) is None


def test_each_target_sees_a_choice_of_its_own_scaled_up() -> None:
    x = jnp.ones((1, 400, 16), jnp.float32)
    # A of ones on the first target and on the second counts the values that are kept.
    lora = ProductLora(jnp.ones((1, 3, 16)), jnp.ones((1, 3)), jnp.ones((1, 8, 3)), (1, 2))
    first, second, third = np.moveaxis(np.asarray(shrink_dropped(x, lora, dropout(0.25))), -1, 0)
    np.testing.assert_array_equal(second, third)
    assert not np.array_equal(first, second)
    for of_target in (first, second):
        assert np.allclose((of_target * 0.75) % 1, 0, atol=1e-4) | np.allclose((of_target * 0.75) % 1, 1, atol=1e-4)
        assert of_target.mean() == pytest.approx(16, rel=0.03)
        assert of_target.std() == pytest.approx(np.sqrt(16 * 0.25 / 0.75), rel=0.15)


def test_what_is_left_out_is_left_out_of_loras_input_alone() -> None:
    """With A that sees one column, the result is all or nothing; the product with the weight stays whole."""
    x = jnp.full((1, 300, 4), 2.0)
    lora = ProductLora(jnp.eye(1, 4)[None], jnp.ones((1, 1)), jnp.ones((1, 8, 1)), (1,))
    seen = np.unique(np.asarray(shrink_dropped(x, lora, dropout(0.5))))
    assert seen.tolist() == [0.0, 4.0]
    assert np.unique(np.asarray(shrink(x, lora.a[0], lora.scale[0]))).tolist() == [2.0]


@jax.jit
def hidden(model: GptOss, dropout: LoraDropout | None) -> jax.Array:
    return model.hidden(TOKENS, dropout=dropout)


def test_it_is_a_function_of_its_key_alone() -> None:
    model = adapted()
    one = hidden(model, dropout())
    np.testing.assert_array_equal(one, hidden(model, dropout()))
    assert not np.array_equal(one, hidden(model, dropout(seed=1)))
    assert not np.array_equal(one, hidden(model, dropout().number(1)))
    assert not np.array_equal(one, hidden(model, None))


def test_experts_have_none() -> None:
    model = adapted()
    assert model.lora is not None
    parts = ({"gate_up": part["gate_up"], "down": part["down"]} for part in dataclasses.astuple(model.lora))
    on_experts = model.with_adapters(LoraWeights(*parts))
    np.testing.assert_array_equal(on_experts.hidden(TOKENS, dropout=dropout()), on_experts.hidden(TOKENS))


@pytest.mark.slow
def test_layers_computed_again_leave_out_the_same() -> None:
    def gradients(model: GptOss) -> list[np.ndarray]:
        graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)  # type: ignore[misc]

        def loss(factors: object) -> jax.Array:
            hidden = nnx.merge(graph, factors, rest).hidden(TOKENS, dropout=dropout())
            return jnp.sum(hidden.astype(jnp.float32) ** 2)

        return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(factors))]

    for kept, again in zip(gradients(adapted()), gradients(adapted(remat="layers")), strict=True):
        np.testing.assert_allclose(again, kept, rtol=1e-4, atol=1e-4 * np.abs(kept).max())


def test_layers_and_products_leave_out_different_values() -> None:
    keys = {
        jax.random.key_data(dropout().number(layer).number(part).number(target).key).tobytes()
        for layer in range(3)
        for part in range(2)
        for target in range(3)
    }
    assert len(keys) == 18


def test_it_is_for_one_adapter() -> None:
    with pytest.raises(ValueError, match="dropout is for training"):
        adapted().hidden(TOKENS, adapter_ids=jnp.zeros(2, jnp.int32), dropout=dropout())


def test_ranks_of_joined_targets_are_known() -> None:
    model = adapted()
    lora = AttentionLora.of(model.lora, model.config, jnp.float32)
    assert lora is not None
    assert lora.qkv is not None
    assert sum(lora.qkv.ranks) == lora.qkv.a.shape[2]
