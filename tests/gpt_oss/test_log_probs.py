"""Log-probabilities of tokens against log_softmax of all logits."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from jmoe import gpt_oss
from jmoe.gpt_oss.log_probs import log_probs_of_hidden
from tests.tolerances import FLOAT32

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
BATCH, LENGTH = 3, 11
IDS = jnp.array([1, -1, 1], jnp.int32)


@pytest.fixture(scope="module")
def model() -> gpt_oss.GptOss:
    """In float32, with the adapter twice, the second time half as strong."""
    base = gpt_oss.load(CASE / "model", dtype=jnp.float32, progress=False)
    lora = gpt_oss.load_adapter(CASE / "adapter", base.config)
    half = gpt_oss.LoraWeights(lora.a, lora.b, {name: scale / 2 for name, scale in lora.scale.items()})
    return base.with_adapters(gpt_oss.stack_adapters([lora, half]))


@pytest.fixture(scope="module")
def tokens(model: gpt_oss.GptOss) -> Array:
    return jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, model.config.vocab_size)


def of_logits(logits: Array, targets: Array) -> Array:
    """The same from the logits of all positions."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def test_entries_are_those_of_log_softmax(model: gpt_oss.GptOss, tokens: Array) -> None:
    others = (tokens * 7 + 3) % model.config.vocab_size

    @jax.jit
    def both(model: gpt_oss.GptOss, tokens: Array) -> tuple[Array, ...]:
        logits = model(tokens, adapter_ids=IDS)
        following = gpt_oss.log_probs(model, tokens, adapter_ids=IDS, chunk=4)
        given = gpt_oss.log_probs(model, tokens, targets=others, adapter_ids=IDS)
        wrong = gpt_oss.log_probs(model, tokens, targets=(others - others[1, 2]).at[0, 0].set(10**6), adapter_ids=IDS)
        return following, of_logits(logits[:, :-1], tokens[:, 1:]), given, of_logits(logits, others), wrong

    following, of_following, given, of_given, wrong = both(model, tokens)
    assert following.shape == (BATCH, LENGTH - 1)
    assert following.dtype == jnp.float32
    np.testing.assert_allclose(following, of_following, rtol=FLOAT32.relative)
    assert given.shape == (BATCH, LENGTH)
    np.testing.assert_allclose(given, of_given, rtol=FLOAT32.relative)
    # Traced targets cannot be an error: they are no other token's log-probability either.
    np.testing.assert_array_equal(jnp.isnan(wrong), (others < others[1, 2]).at[0, 0].set(True))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_chunks_change_neither_values_nor_gradients(model: gpt_oss.GptOss, tokens: Array, dtype: Any) -> None:
    hidden = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, model.config.hidden_size), dtype)
    weights = jax.random.normal(jax.random.key(1), (BATCH, LENGTH))  # of either sign, as advantages are
    want, wanted = jax.value_and_grad(lambda hidden: jnp.sum(weights * of_logits(model.logits(hidden), tokens)))(hidden)
    for chunk in (1, 4, BATCH * LENGTH, 1000):
        found, back = jax.vjp(lambda hidden, chunk=chunk: log_probs_of_hidden(model, hidden, tokens, chunk), hidden)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(jnp.sum(weights * found), want, rtol=FLOAT32.relative)
        (gradient,) = back(weights)
        assert gradient.dtype == dtype
        error = np.linalg.norm(np.asarray(gradient - wanted, np.float32))
        assert error <= FLOAT32.relative * np.linalg.norm(np.asarray(wanted, np.float32))


@pytest.mark.slow
def test_a_policy_gradient_is_the_one_of_all_logits(model: gpt_oss.GptOss, tokens: Array) -> None:
    """In LoRA's factors: an advantage of either sign for each token, 0 for the prompt's."""
    weights = jax.random.normal(jax.random.key(1), (BATCH, LENGTH - 1)) * (jnp.arange(LENGTH - 1) >= 3).astype(
        jnp.float32
    )
    graph, factors, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def objective(factors: Any, plain: bool) -> Array:
        merged = nnx.merge(graph, factors, frozen)
        if plain:
            found = of_logits(merged(tokens, adapter_ids=IDS)[:, :-1], tokens[:, 1:])
        else:
            found = gpt_oss.log_probs(merged, tokens, adapter_ids=IDS, chunk=4)
        return jnp.sum(weights * found)

    got, want = jax.jit(lambda factors: [jax.value_and_grad(objective)(factors, plain) for plain in (False, True)])(
        factors
    )
    np.testing.assert_allclose(got[0], want[0], rtol=FLOAT32.relative)
    leaves = list(zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True))
    assert len(leaves) == 12
    for leaf, wanted in leaves:
        assert np.linalg.norm(wanted[:, 1]) > 0
        assert np.linalg.norm(leaf - wanted) <= 1e-4 * np.linalg.norm(wanted)
        assert not leaf[:, 0].any()  # no sequence has adapter 0


def test_a_packed_row_scores_as_its_segments_do(model: gpt_oss.GptOss, tokens: Array) -> None:
    first, second = tokens[:1, :6], tokens[1:2, :5]
    rows = jnp.concatenate([jnp.concatenate([first, second], axis=1), tokens[:2]])
    segments = jnp.array([[3] * 6 + [5] * 5, [1] * 11, [1] * 11], jnp.int32)
    ids = jnp.ones(3, jnp.int32)
    row, *alone = jax.jit(lambda tokens: gpt_oss.log_probs(model, tokens, segment_ids=segments, adapter_ids=ids))(rows)
    np.testing.assert_allclose(row[:5], alone[0][:5], rtol=1e-4)
    assert row[5] == 0  # nothing stands before the second segment's first token
    np.testing.assert_allclose(row[6:], alone[1][:4], rtol=1e-4)


def test_logits_of_all_positions_are_never_held(model: gpt_oss.GptOss) -> None:
    positions, vocabulary, width = 2048, 16384, model.config.hidden_size
    large = gpt_oss.load(CASE / "model", dtype=jnp.float32, progress=False)
    large.head.set_value(jnp.zeros((vocabulary, width), jnp.bfloat16))

    def objective(hidden: Array, weights: Array, targets: Array) -> Array:
        return jnp.sum(weights * log_probs_of_hidden(large, hidden, targets, 64))

    shapes = [(1, positions, width), (1, positions), (1, positions)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32]
    given = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, dtypes, strict=True)]
    memory = jax.jit(jax.grad(objective)).lower(*given).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * positions * vocabulary / 4


def test_one_token_has_no_entry(model: gpt_oss.GptOss, tokens: Array) -> None:
    one = jax.eval_shape(lambda tokens: gpt_oss.log_probs(model, tokens, adapter_ids=IDS), tokens[:, :1])
    assert (one.shape, one.dtype) == ((BATCH, 0), jnp.float32)
    assert gpt_oss.log_probs(model, tokens[:, :0], adapter_ids=IDS).shape == (BATCH, 0)


def test_arguments_that_do_not_fit_are_errors(model: gpt_oss.GptOss, tokens: Array) -> None:
    for options, message in (
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"targets": tokens[:, 1:]}, r"targets must be integers like tokens \(3, 11\), got int32 with shape \(3, 10\)"),
        ({"targets": tokens.astype(jnp.float32)}, "targets must be integers like tokens .* got float32"),
        ({"targets": tokens.at[1, 1].set(-100)}, r"targets must be in \[0, \d+\), got -100"),
        ({"segment_ids": tokens[:, 1:]}, "segment_ids must be integers like tokens"),
        ({"adapter_ids": IDS + 1}, r"adapter_ids must be in \[-1, 2\), got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            gpt_oss.log_probs(model, tokens, **{"adapter_ids": IDS, **options})
