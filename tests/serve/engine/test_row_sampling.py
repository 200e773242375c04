"""Rows with options of their own: each draws as it would alone, from what transformers would draw from."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.gpt_oss.sample import penalized
from jmoe.serve.engine.request import SamplingParams
from jmoe.serve.engine.row_options import RowOptions, pack_options
from jmoe.serve.engine.row_sampling import adjust, choose_rows, kept
from tests.transformers_sampling import transformers_probabilities

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.6, "top_k": 7, "top_p": 0.8, "min_p": 0.15},
    {"temperature": 0.5, "top_k": 1},
    {"top_p": 1e-6},
    {"top_p": 1e-300},
    {"top_k": 10**12, "min_p": 1.0},
]
VOCABULARY = 24


def rows(options: list[dict[str, Any]], seeds: list[int] | None = None) -> RowOptions:
    every = [SamplingParams(max_tokens=1, **own) for own in options]
    packed = [pack_options(own, seed, -1) for own, seed in zip(every, seeds or range(len(every)), strict=True)]
    return RowOptions.unpack(jnp.asarray(np.stack(packed)))


def logits(count: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(0, 1.5, (count, VOCABULARY)), jnp.float32)


choose = jax.jit(choose_rows, static_argnames="truncates")


def test_options_come_back_as_they_were() -> None:
    params = SamplingParams(
        max_tokens=1,
        temperature=0.3,
        top_p=0.9,
        top_k=10**12,
        min_p=0.1,
        presence_penalty=-1.0,
        logit_bias={1: 2.0, 3: 4.0},
    )
    options = RowOptions.unpack(jnp.asarray(pack_options(params, 2**63 + 7, 3)[None]))
    assert options.temperature[0] == np.float32(0.3)
    assert options.presence_penalty[0] == -1
    assert options.top_k[0] == 2**31 - 1
    assert (options.adapter[0], options.biases[0]) == (3, 2)
    assert options.seed[0].tolist() == [2**31, 7]
    small = RowOptions.unpack(jnp.asarray(pack_options(params, 7, -1)[None]))
    assert (jax.random.key_data(jax.random.key(7)) == small.seed[0]).all()
    negative = RowOptions.unpack(jnp.asarray(pack_options(params, -1, -1)[None]))
    assert negative.seed[0].tolist() == [2**32 - 1] * 2


def test_what_is_left_is_what_transformers_leaves() -> None:
    sampled = [own for own in OPTIONS if own.get("temperature") != 0]
    options, own = rows(sampled), logits(len(sampled))
    scaled = (own - own.max(axis=1, keepdims=True)) / options.temperature[:, None]
    left = np.asarray(jax.jit(kept)(scaled, options))
    for row, given in enumerate(sampled):
        every = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | given
        want = transformers_probabilities(np.asarray(own[row]), [0], **every | {"top_k": min(every["top_k"], 50)})
        assert np.flatnonzero(left[row]).tolist() == np.flatnonzero(want).tolist(), given


def test_equals_of_the_last_that_is_left_stay() -> None:
    own = jnp.log(jnp.array([[0.3, 0.2, 0.2, 0.2, 0.1]] * 2, jnp.float32))
    own -= own.max(axis=1, keepdims=True)
    left = kept(own, rows([{"top_k": 2}, {"top_p": 0.45}]))
    assert left.tolist() == [[True, True, True, True, False]] * 2


def test_draws_follow_the_probabilities() -> None:
    given = {"temperature": 1.6, "top_k": 7, "top_p": 0.8, "min_p": 0.15}
    one = logits(1)
    want = transformers_probabilities(np.asarray(one[0]), [0], **given)
    count = 6000
    tokens = choose(
        jnp.repeat(one, count, axis=0), rows([given] * count), jnp.arange(count, dtype=jnp.int32), truncates=True
    )
    found = np.bincount(np.asarray(tokens), minlength=VOCABULARY) / count
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(want))
    np.testing.assert_allclose(found, want, atol=0.03)


def test_a_row_draws_as_alone_and_by_its_seed_and_position() -> None:
    own, seeds = logits(len(OPTIONS)), [3] * len(OPTIONS)
    positions = jnp.arange(len(OPTIONS), dtype=jnp.int32)
    together = choose(own, rows(OPTIONS, seeds), positions, truncates=True)
    for row in range(len(OPTIONS)):
        alone = choose(own[row : row + 1], rows(OPTIONS[row : row + 1], [3]), positions[row : row + 1], truncates=True)
        assert together[row] == alone[0]
    assert together[1] == own[1].argmax()
    flat = jnp.zeros((64, 4096), jnp.float32)
    draws = choose(flat, rows([{}] * 64, [3] * 64), jnp.arange(64, dtype=jnp.int32), truncates=False)
    assert len(set(draws.tolist())) > 60
    again = choose(flat, rows([{}] * 64, [4] * 64), jnp.arange(64, dtype=jnp.int32), truncates=False)
    assert (draws != again).sum() > 60


def test_programs_that_do_less_draw_the_same() -> None:
    given = [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"temperature": 1e-38}]
    own, positions = logits(4), jnp.arange(4, dtype=jnp.int32)
    more = choose(own, rows(given), positions, truncates=True)
    assert (choose(own, rows(given), positions, truncates=False) == more).all()
    assert (more[2:] == own[2:].argmax(axis=1)).all()


def bias(pairs: dict[int, float]) -> tuple[jax.Array, jax.Array]:
    """Four entries, of which those behind the pairs are an earlier sequence's."""
    entries = list((pairs | dict.fromkeys(range(10, 14), 50.0)).items())[:4]
    tokens, values = zip(*entries, strict=True)
    return jnp.array([tokens], jnp.int32), jnp.array([values], jnp.float32)


@pytest.mark.parametrize("in_prompt", [True, False])
def test_penalties_and_bias(in_prompt: bool) -> None:
    own = logits(1)
    pairs = {0: 2.0, 3: -1.0}
    given = {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": pairs}
    counts = np.zeros((1, VOCABULARY), np.int32)
    counts[0, 3], counts[0, 4] = 2 * 1 + in_prompt, 2 * 3
    counts[0, 5] = in_prompt
    found = np.asarray(adjust(own, rows([given]), jnp.asarray(counts), *bias(pairs)))[0]
    biased = own.at[0, 0].add(2.0).at[0, 3].add(-1.0)
    want = np.array(penalized(biased, jnp.asarray(counts > 0), 1.7))[0]
    want[3] -= 0.5 + 0.25
    want[4] -= 0.5 + 0.75
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_rows_without_penalties_keep_their_bits() -> None:
    own = logits(2)
    counts = jnp.full((2, VOCABULARY), 9, jnp.int32)
    tokens, biases = bias({})
    found = adjust(own, rows([{}, {}]), counts, jnp.repeat(tokens, 2, axis=0), jnp.repeat(biases, 2, axis=0))
    assert np.array_equal(np.asarray(found).view(np.int32), np.asarray(own).view(np.int32))


def test_the_order_is_transformers_with_a_repetition_penalty() -> None:
    given = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.6}
    own, options = logits(1), rows([given])
    seen = [0, 3, 4, 11]
    counts = np.zeros((1, VOCABULARY), np.int32)
    counts[0, seen] = 1
    adjusted = adjust(own, options, jnp.asarray(counts), *bias({}))
    left = kept((adjusted - adjusted.max()) / 0.5, options)
    want = transformers_probabilities(np.asarray(own[0]), seen, **given)
    assert np.flatnonzero(left[0]).tolist() == np.flatnonzero(want).tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", float("inf")),
        ("seed", "x"),
        ("logit_bias", dict.fromkeys(range(301), 0.0)),
        ("logit_bias", {1: float("nan")}),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_options_out_of_range_are_named(field: str, value: Any) -> None:
    good = SamplingParams(max_tokens=1)
    with pytest.raises(ValueError, match=f"^{field} must be "):
        dataclasses.replace(good, **{field: value})
