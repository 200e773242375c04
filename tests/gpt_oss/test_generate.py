"""Generated text: greedy, sampled, stopped, streamed, in batches."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import gpt_oss
from jmoe.gpt_oss.generate import check_finite, step_rate
from jmoe.gpt_oss.sample import Sampling, choose, sample
from tests.transformers_sampling import transformers_probabilities

CASE = Path(__file__).parents[1] / "data" / "tiny_case"


@pytest.fixture(scope="module")
def model() -> gpt_oss.GptOss:
    return gpt_oss.load(CASE / "model", adapter=CASE / "adapter", dtype=jnp.float32, progress=False)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(CASE / "expected.npz") as arrays:
        return {name: arrays[name] for name in ("gen_prompt", "gen_tokens", "gen_tokens_adapter")}


def test_a_batch_of_prompts_and_adapters(model: gpt_oss.GptOss, expected: dict[str, np.ndarray]) -> None:
    prompt = expected["gen_prompt"][0].tolist()
    streamed = []
    generated = gpt_oss.generate(
        model,
        [prompt, prompt, prompt[:2]],
        max_new_tokens=16,
        stop_tokens=[],
        adapter_ids=[-1, 0, 0],
        callback=lambda tokens, text: streamed.append(tokens),
        chunk=6,
    )
    assert generated.tokens[0].tolist() == expected["gen_tokens"].tolist()
    assert generated.tokens[1].tolist() == expected["gen_tokens_adapter"].tolist()
    assert generated.lengths.tolist() == [16, 16, 16]
    assert [part.shape[1] for part in streamed] == [6, 6, 4]
    assert np.array_equal(np.concatenate(streamed, axis=1), generated.tokens)


def test_a_sequence_ends_at_its_stop_token(model: gpt_oss.GptOss, expected: dict[str, np.ndarray]) -> None:
    want = expected["gen_tokens"].tolist()
    stop = want[5]
    end = want.index(stop)
    prompt = expected["gen_prompt"][0].tolist()
    options = {"max_new_tokens": 16, "stop_tokens": [stop], "adapter_ids": [-1], "chunk": 4}
    generated = gpt_oss.generate(model, [prompt], **options)
    assert generated.lengths.tolist() == [end]
    assert generated.tokens[0, : end + 1].tolist() == want[: end + 1]
    assert (generated.tokens[0, end + 1 :] == model.config.pad_token_id).all()


def test_the_configuration_says_what_stops_where_nothing_else_does(expected: dict[str, np.ndarray]) -> None:
    want = expected["gen_tokens"].tolist()
    config = dataclasses.replace(gpt_oss.Config.load(CASE / "model"), stop_tokens=(want[9], want[5]))
    model = gpt_oss.load(CASE / "model", dtype=jnp.float32, progress=False)
    model.config = config
    generated = gpt_oss.generate(model, [expected["gen_prompt"][0].tolist()], max_new_tokens=16)
    assert generated.lengths.tolist() == [min(want.index(want[9]), want.index(want[5]))]


def test_a_seed_is_a_text(model: gpt_oss.GptOss) -> None:
    run = lambda seed: gpt_oss.generate(  # noqa: E731
        model, [[1, 2, 3]], max_new_tokens=12, stop_tokens=[], temperature=1.0, seed=seed, adapter_ids=[-1]
    ).tokens.tolist()
    assert run(1) == run(1)
    assert run(1) != run(2)


def test_samples_follow_temperature_and_top_p() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def draw(temperature: float, top_p: float) -> np.ndarray:
        tokens = jax.vmap(lambda key: sample(logits, key, temperature, top_p)[0])(keys)
        return np.bincount(np.asarray(tokens), minlength=4) / len(keys)

    np.testing.assert_allclose(draw(1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(draw(1.0, 0.7), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(draw(0.5, 1.0), np.array([25, 9, 2.25, 0.25]) / 36.5, atol=0.03)
    assert draw(1.0, 1e-6).tolist() == [1, 0, 0, 0]
    for temperature in (1e-3, 1e-37, 1e-45):
        assert draw(temperature, 1.0).tolist() == [1, 0, 0, 0]
    largest_last = sample(logits[:, ::-1], keys[0], 1e-40, 1.0)
    assert largest_last.tolist() == [3]


def test_more_likeliest_tokens_than_int32_counts_are_all() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    draw = jax.jit(lambda sampling, key: choose(logits, key, sampling, None))
    drawn = [draw(Sampling.create(1.0, 1.0, top_k, 0.0, 1.0), jax.random.key(3)) for top_k in (0, 4, 10**30)]
    assert len({int(token[0]) for token in drawn}) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"temperature": 1.6, "top_k": 7, "top_p": 0.8, "min_p": 0.15, "repetition_penalty": 1.4},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.6},
    ],
)
def test_sampling_is_that_of_transformers(options: dict[str, float]) -> None:
    logits = np.random.default_rng(0).normal(0, 1.5, 24).astype(np.float32)
    seen = [0, 3, 4, 11, int(logits.argmax())]
    mask = np.zeros((1, 24), bool)
    mask[0, seen] = True
    every = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0} | options
    sampling = Sampling.create(**every)
    draw = jax.jit(jax.vmap(lambda key: choose(jnp.asarray(logits)[None], key, sampling, jnp.asarray(mask))[0]))
    tokens = draw(jax.random.split(jax.random.key(0), 6000))
    want = transformers_probabilities(logits, seen, **every)
    found = np.bincount(np.asarray(tokens), minlength=24) / len(tokens)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(want))
    np.testing.assert_allclose(found, want, atol=0.03)


@pytest.mark.slow
def test_a_repetition_penalty_counts_the_prompt_and_the_text(model: gpt_oss.GptOss) -> None:
    prompt = [5, 6, 7]
    options = {"max_new_tokens": 24, "stop_tokens": [], "adapter_ids": [-1]}
    generated = gpt_oss.generate(model, [prompt], repetition_penalty=1e4, **options).tokens[0].tolist()
    assert len({*prompt, *generated}) == len(prompt) + 24


@pytest.mark.slow
def test_a_seed_of_its_own_gives_a_sequence_the_text_that_it_has_alone(model: gpt_oss.GptOss) -> None:
    options = {"max_new_tokens": 12, "stop_tokens": [], "temperature": 1.5, "top_k": 50}
    prompts = [[1, 2, 3], [4, 5, 6], [1, 2, 3], [1, 2, 3]]
    together = gpt_oss.generate(model, prompts, seed=[7, 8, 9, 7], adapter_ids=[-1] * 4, **options).tokens
    for row, (prompt, seed) in enumerate(zip(prompts, [7, 8, 9, 7], strict=True)):
        alone = gpt_oss.generate(model, [prompt], seed=seed, adapter_ids=[-1], **options).tokens[0]
        assert together[row].tolist() == alone.tolist()
    assert together[0].tolist() == together[3].tolist() != together[2].tolist()


def test_a_callback_may_end_a_sequence(model: gpt_oss.GptOss) -> None:
    generated = gpt_oss.generate(
        model,
        [[1, 2, 3], [4, 5, 6]],
        max_new_tokens=12,
        stop_tokens=[],
        adapter_ids=[-1, -1],
        callback=lambda tokens, text: np.array([False, True]),
        chunk=4,
    )
    assert generated.lengths.tolist() == [12, 4]
    assert (generated.tokens[1, 4:] == model.config.pad_token_id).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_an_error(value: float) -> None:
    model = gpt_oss.load(CASE / "model", dtype=jnp.float32, progress=False)
    embedding = model.embedding.get_value()
    model.embedding.set_value(embedding.at[9].set(value))
    good = gpt_oss.generate(model, [[1, 2, 3]], max_new_tokens=2, stop_tokens=[])
    assert good.lengths.tolist() == [2]
    with pytest.raises(ValueError, match=r"logits are not finite in sequence 1 at its new token 1\b"):
        gpt_oss.generate(model, [[1, 2, 3], [1, 9, 3]], max_new_tokens=2, stop_tokens=[])


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_one_infinite_logit_is_an_error_though_it_may_never_be_chosen(value: float) -> None:
    model = gpt_oss.load(CASE / "model", dtype=jnp.float32, progress=False)
    model.head.set_value(model.head.get_value().at[9, 0].set(value))
    with pytest.raises(ValueError, match=r"logits are not finite in sequence 0 at its new token 1\b"):
        gpt_oss.generate(model, [[1, 2, 3]], max_new_tokens=2, stop_tokens=[])


def test_the_first_token_whose_logits_are_not_finite_is_named() -> None:
    finite = np.ones((3, 2), bool)
    check_finite(finite, 8)
    finite[1:, 0] = False
    with pytest.raises(ValueError, match="sequence 0 at its new token 10:"):
        check_finite(finite, 8)


def test_the_rate_of_steps_leaves_out_what_may_have_compiled() -> None:
    assert step_rate([(16, 9.0), (16, 2.0), (16, 2.0), (4, 9.0)]) == 8
    assert step_rate([(16, 9.0), (4, 9.0)]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts must be at least one token each"),
        ({"prompts": [[1], []]}, r"got lengths \[1, 0\]"),
        ({"prompts": [[128]]}, r"token ids must be in \[0, 128\), got 128 to 128"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2**31 - 1}, "must be at most 2147483647 in all, got 2147483647 new ones"),
        ({"prompts": [[1.7]]}, "prompts must be token ids, which are integers"),
        ({"adapter_ids": [0.5]}, r"adapter_ids must be integers, got \[0.5\]"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"temperature": -1}, "temperature must be 0 or more, got -1"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_k": -1}, "top_k must be an integer, 0 for all or more, got -1"),
        ({"top_k": 1.5}, "top_k must be an integer, 0 for all or more, got 1.5"),
        ({"min_p": float("nan")}, r"min_p must be in \[0, 1\], got nan"),
        ({"repetition_penalty": 0}, "repetition_penalty must be positive and finite, got 0"),
        ({"seed": [1, 2]}, r"seed must be one, or one for each of the 1 prompts, got \[1, 2\]"),
    ],
)
def test_options_out_of_range(model: gpt_oss.GptOss, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt_oss.generate(model, **({"prompts": [[1]], "max_new_tokens": 1} | options))
