"""Log-probabilities of rows, and the likeliest tokens found by blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.serve.engine.row_logprobs import BLOCK, RowLogprobs, largest_of, logprob_rows, prompt_logprob_rows


@pytest.mark.parametrize("vocabulary", [20, 128, 21 * BLOCK, 40 * BLOCK + 7])
@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_are_top_ks(vocabulary: int, ties: bool) -> None:
    values = np.random.default_rng(vocabulary).normal(size=(3, vocabulary)).astype(np.float32)
    if ties:
        values = np.round(values) + 0.0  # no -0.0, which top_k takes for less
    places, found = jax.jit(largest_of, static_argnums=1)(jnp.asarray(values), 20)
    want, tokens = jax.lax.top_k(jnp.asarray(values), 20)
    assert np.array_equal(found, want)
    assert np.array_equal(places, tokens)


def test_rows_are_log_softmax() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    tokens = np.array([4, 0, 49, 7], np.int32)
    rows = RowLogprobs.unpack(np.asarray(logprob_rows(jnp.asarray(logits), jnp.asarray(tokens))))
    want = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    for row, token in enumerate(tokens):
        logprob, top = rows.row(row, 5)
        assert logprob == pytest.approx(want[row, token], abs=1e-5)
        assert [each for each, _ in top] == np.argsort(-want[row])[:5].tolist()
        assert [value for _, value in top] == pytest.approx(np.sort(want[row])[:-6:-1], abs=1e-5)
    assert rows.row(0, 0)[1] == ()


@pytest.mark.parametrize("tokens", [16, 300])
def test_a_chunks_rows_are_those_of_its_logits(tokens: int) -> None:
    generator = np.random.default_rng(2)
    hidden = jnp.asarray(generator.normal(size=(tokens, 8)), jnp.float32)
    head = jnp.asarray(generator.normal(size=(40, 8)), jnp.float32)
    targets = jnp.asarray(generator.integers(0, 40, tokens), jnp.int32)
    want = RowLogprobs.unpack(np.asarray(logprob_rows(hidden @ head.T, targets)))
    found = RowLogprobs.unpack(np.asarray(prompt_logprob_rows(hidden, head, targets)))
    np.testing.assert_allclose(found.logprob, want.logprob, atol=1e-5)
    np.testing.assert_allclose(found.top, want.top, atol=1e-5)
    assert found.tokens.shape == (tokens, 20)
