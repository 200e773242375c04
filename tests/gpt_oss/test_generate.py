"""Generated text: greedy, sampled, stopped, streamed, in batches."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import gpt_oss
from jmoe.gpt_oss.generate import step_rate
from jmoe.gpt_oss.sample import sample

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
    ],
)
def test_options_out_of_range(model: gpt_oss.GptOss, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt_oss.generate(model, **({"prompts": [[1]], "max_new_tokens": 1} | options))
