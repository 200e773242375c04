"""The engine on the tiny checkpoint: each request's text is its own, whatever else runs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import gpt_oss
from jmoe.serve.engine import (
    Cancelled,
    Engine,
    EngineSettings,
    EngineStats,
    EngineStoppedError,
    Failed,
    Finished,
    NoPlaceError,
    PromptLogprobs,
    QueueFullError,
    Request,
    SamplingParams,
    TooLongError,
    UnknownAdapterError,
)
from jmoe.serve.engine.pages import Pages
from jmoe.serve.engine.runner import Runner
from tests.serve.engine.engines import ADAPTERS, NEW, PROMPTS, SETTINGS, Answer, ask, name_of, running


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("pages", [None, 5])
def test_greedy_text_is_generates_whatever_else_runs(
    runner: Runner,
    model: gpt_oss.GptOss,
    adapter: gpt_oss.LoraWeights,
    texts: list[list[int]],
    caching: bool,
    pages: int | None,
) -> None:
    settings = dataclasses.replace(SETTINGS, prefix_caching=caching)
    with running(runner, model, settings=settings, pages=pages) as engine:
        engine.load_adapter("tiny", adapter)
        answers = []
        for number, (prompt, own) in enumerate(zip(PROMPTS, ADAPTERS, strict=True)):
            answers.append(ask(engine, prompt, name_of(own), max_tokens=NEW - number))
            ask(engine, prompt[::-1], name_of(own), max_tokens=25, temperature=1.5, top_k=9, presence_penalty=0.5)
        for answer, text in zip(answers, texts, strict=True):
            assert answer.tokens == text[: len(answer.tokens)]
        # Again, when what was computed may be found.
        again = [ask(engine, prompt, name_of(own), max_tokens=8) for prompt, own in zip(PROMPTS, ADAPTERS, strict=True)]
        assert [answer.tokens for answer in again] == [text[:8] for text in texts]
        stats = engine.stats()
        assert (stats.cached_tokens > 0) == caching
        assert (stats.preemptions > 0) == (pages is not None)


def test_a_stop_token_ends_a_text(engine: Engine, texts: list[list[int]], monkeypatch: Any) -> None:
    text = texts[0]
    end = ask(engine, PROMPTS[0], stop_tokens=(text[5],)).wait()
    assert end.tokens == text[: text.index(text[5])]
    assert end.end == Finished(
        reason="stop",
        stop_token=text[5],
        prompt_tokens=len(PROMPTS[0]),
        cached_tokens=0,
        new_tokens=text.index(text[5]),
    )
    # The model's own count unless they are ignored.
    stop = model_stop(engine, (text[5],))
    try:
        assert ask(engine, PROMPTS[0], ignore_eos=False).end.stop_token == text[5]
        assert ask(engine, PROMPTS[0], ignore_eos=True).tokens == text[:12]
    finally:
        model_stop(engine, stop)


def model_stop(engine: Engine, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Sets the model's stop tokens; returns those before."""
    before = engine._model.config.stop_tokens
    engine._model.config = dataclasses.replace(engine._model.config, stop_tokens=tokens)
    return before


def test_a_seed_is_a_text_whatever_else_runs(engine: Engine) -> None:
    options = {"temperature": 1.3, "seed": 2**40 + 5, "max_tokens": 20}
    alone = ask(engine, PROMPTS[2], **options).tokens
    beside = [ask(engine, PROMPTS[3], temperature=0.9, top_p=0.8, max_tokens=9, logprobs=3) for _ in range(3)]
    together = ask(engine, PROMPTS[2], **options)
    assert together.tokens == alone
    assert together.end.cached_tokens == (len(PROMPTS[2]) - 1) // 64 * 64
    assert {event.cached_tokens for event in together.logprobs} == {together.end.cached_tokens}
    assert ask(engine, PROMPTS[2], **options | {"seed": 5}).tokens != alone
    unseeded = [ask(engine, PROMPTS[2], **options | {"seed": None}) for _ in range(2)]
    assert unseeded[0].tokens != unseeded[1].tokens
    assert all(answer.tokens for answer in beside)


def test_what_was_put_back_goes_on_with_the_same_draws(runner: Runner, model: gpt_oss.GptOss) -> None:
    options = {"temperature": 1.3, "frequency_penalty": 0.3, "max_tokens": 60}
    with running(runner, model) as engine:
        want = [ask(engine, PROMPTS[5][:50], seed=seed, **options).tokens for seed in range(3)]
    with running(runner, model, pages=5) as engine:
        answers = [ask(engine, PROMPTS[5][:50], seed=seed, **options) for seed in range(3)]
        assert [answer.tokens for answer in answers] == want
        assert engine.stats().preemptions > 0


def test_log_probabilities_are_the_models(engine: Engine, model: gpt_oss.GptOss) -> None:
    prompt = PROMPTS[4][:90]
    answer = ask(engine, prompt, logprobs=3, prompt_logprobs=20, max_tokens=4)
    beside = ask(engine, PROMPTS[1], logprobs=0, max_tokens=3)
    tokens = answer.tokens
    logits = np.asarray(model(jnp.asarray([prompt + tokens]))[0], np.float64)
    want = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-want, axis=1, kind="stable")
    entries = answer.prompt.entries
    assert len(entries) == len(prompt)
    assert entries[0] is None
    for position in range(1, len(prompt)):
        entry = entries[position]
        assert entry is not None
        assert entry.logprob == pytest.approx(want[position - 1, prompt[position]], abs=1e-4)
        assert [token for token, _ in entry.top] == order[position - 1, :20].tolist()
    for step, event in enumerate(answer.logprobs):
        row = len(prompt) + step - 1
        assert event.logprob == pytest.approx(want[row, event.token], abs=1e-4)
        assert [token for token, _ in event.top] == order[row, :3].tolist()
        assert [value for _, value in event.top] == pytest.approx(want[row, order[row, :3]], abs=1e-4)
    assert [event.top for event in beside.logprobs] == [()] * 3
    echo = ask(engine, prompt, prompt_logprobs=0, max_tokens=0)
    assert echo.tokens == []
    assert echo.prompt.entries[5].logprob == pytest.approx(entries[5].logprob, abs=1e-6)
    assert echo.end.cached_tokens == 0


def test_a_repetition_penalty_is_generates(engine: Engine, model: gpt_oss.GptOss) -> None:
    prompt = PROMPTS[6][:20]
    want = gpt_oss.generate(model, [prompt], max_new_tokens=16, stop_tokens=[], repetition_penalty=1.8).tokens[0]
    assert ask(engine, prompt, max_tokens=16, repetition_penalty=1.8).tokens == want.tolist()


def test_bias_and_penalties_change_what_is_likeliest(engine: Engine) -> None:
    assert ask(engine, [1, 2, 3], max_tokens=4, logit_bias={77: 1000.0}).tokens == [77] * 4
    once = ask(engine, [1, 2, 3], max_tokens=4, logit_bias={77: 1000.0}, presence_penalty=2000.0).tokens
    assert once[0] == 77
    assert 77 not in once[1:]
    # Twice 400 is taken after the second.
    twice = ask(engine, [1, 2, 3], max_tokens=4, logit_bias={77: 1000.0}, frequency_penalty=600.0).tokens
    assert twice[:2] == [77, 77]
    assert 77 not in twice[2:]


def test_nothing_compiles_once_the_engine_runs(engine: Engine, adapter: gpt_oss.LoraWeights) -> None:
    compiled: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1.5)(np.float32(1))
        assert compiled  # it would be heard
        compiled.clear()
        half = jax.tree.map(np.asarray, adapter)
        small = dataclasses.replace(half, a={"o": half.a["o"]}, b={"o": half.b["o"]}, scale={"o": half.scale["o"]})
        engine.load_adapter("tiny", adapter)
        engine.load_adapter("small", small)
        answers = [
            ask(engine, PROMPTS[number][: 7 * number + 1], name, max_tokens=3 + number, **options)
            for number, (name, options) in enumerate(
                [
                    ("tiny", {}),
                    ("small", {"temperature": 1.0}),
                    (None, {"temperature": 0.5, "min_p": 0.1}),
                    ("small", {"logprobs": 2, "prompt_logprobs": 2}),
                    (None, {"logit_bias": {3: 1.0, 4: -1.0}, "repetition_penalty": 1.1}),
                    ("tiny", {"top_p": 0.5, "temperature": 2.0}),
                ]
            )
        ]
        assert all(answer.tokens for answer in answers)
        engine.unload_adapter("small")
        engine.load_adapter("other", small)
        assert ask(engine, [5], "other").tokens
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_adapters_come_and_go(engine: Engine, adapter: gpt_oss.LoraWeights, texts: list[list[int]]) -> None:
    with pytest.raises(UnknownAdapterError, match="'tiny'"):
        ask(engine, [1], "tiny")
    engine.load_adapter("tiny", adapter)
    with pytest.raises(ValueError, match="loaded already"):
        engine.load_adapter("tiny", adapter)
    engine.load_adapter("twin", adapter)
    assert engine.adapters() == ("tiny", "twin")
    with pytest.raises(NoPlaceError, match="all 2 places"):
        engine.load_adapter("third", adapter)
    long = [ask(engine, PROMPTS[1], name, max_tokens=NEW) for name in ("tiny", "twin")]
    engine.unload_adapter("tiny")
    with pytest.raises(UnknownAdapterError):
        ask(engine, [1], "tiny")
    assert [answer.tokens for answer in long] == [texts[1]] * 2
    # Its place is free once its last request has ended.
    zero = jax.tree.map(np.zeros_like, jax.tree.map(np.asarray, adapter))
    engine.load_adapter("nothing", zero)
    # Nothing that the adapter before it computed is taken for its own.
    base, changed = ask(engine, PROMPTS[1], max_tokens=8), ask(engine, PROMPTS[1], "nothing", max_tokens=8)
    assert base.tokens == changed.tokens != texts[1][:8]
    assert ask(engine, PROMPTS[1], "twin", max_tokens=8).tokens == texts[1][:8]


def test_an_adapter_that_does_not_fit_is_refused(engine: Engine, adapter: gpt_oss.LoraWeights) -> None:
    host = jax.tree.map(np.asarray, adapter)
    wide = dataclasses.replace(host, a={"q": np.zeros((2, 1, 4, 64))}, b={"q": np.zeros((2, 1, 128, 4))})
    with pytest.raises(ValueError, match="at most max_lora_rank = 3, got 4"):
        engine.load_adapter("wide", wide)
    with pytest.raises(ValueError, match="LoRA on q must be of one adapter"):
        engine.load_adapter("two", gpt_oss.stack_adapters([adapter, adapter]))
    assert engine.adapters() == ()
    assert len(engine._adapters.free) == 2


def test_an_adapter_with_nan_fails_its_own_requests(
    engine: Engine, adapter: gpt_oss.LoraWeights, texts: list[list[int]]
) -> None:
    bad = jax.tree.map(np.array, adapter)
    bad.b["q"][1, 0, 3, 0] = np.nan
    engine.load_adapter("bad", bad)
    first = ask(engine, PROMPTS[0], max_tokens=NEW)
    failed = [ask(engine, PROMPTS[0], "bad") for _ in range(3)]
    second = ask(engine, PROMPTS[2], max_tokens=NEW)
    for answer in failed:
        assert isinstance(answer.end, Failed)
        assert "new token 1 are not finite" in answer.end.message
    assert (first.tokens, second.tokens) == (texts[0], texts[2])
    # Pages that hold NaN still are taken by others.
    more = [ask(engine, prompt) for prompt in PROMPTS[2:4]]
    assert more[0].tokens == texts[2][:12]


@pytest.mark.parametrize("where", ["decode", "prefill", "draw"])
def test_an_error_within_a_step_fails_its_requests_alone(
    engine: Engine, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    programs = engine._runner.programs
    plain, calls = getattr(programs, where), []

    def once(*arguments: Any) -> Any:
        calls.append(where)
        if len(calls) == 2:
            raise RuntimeError("the device is out of memory\nand more")
        return plain(*arguments)

    first = ask(engine, PROMPTS[0], max_tokens=NEW)
    monkeypatch.setattr(programs, where, once)
    answers = [first, *(ask(engine, PROMPTS[number], max_tokens=NEW) for number in (2, 3, 5, 6))]
    ends = [answer.end for answer in answers]
    failed = [end for end in ends if isinstance(end, Failed)]
    assert failed
    assert {end.message for end in failed} == {"a step has failed: the device is out of memory"}
    for number, answer in zip((0, 2, 3, 5, 6), answers, strict=True):
        if isinstance(answer.end, Finished) and number != 1 and ADAPTERS[number] < 0:
            assert answer.tokens == texts[number]
    assert ask(engine, PROMPTS[0]).tokens == texts[0][:12]


def test_a_receiver_that_fails_ends_its_request_alone(engine: Engine, texts: list[list[int]]) -> None:
    got: list[type] = []

    def fails(event: Any) -> None:
        got.append(type(event))
        raise ValueError("a receiver")

    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    engine.submit(Request(id="bad", prompt=[1, 2], adapter=None, sampling=params), fails)
    assert ask(engine, PROMPTS[0]).tokens == texts[0][:12]
    assert got == [PromptLogprobs, Cancelled]


def test_a_cancelled_request_ends_once_and_frees_what_it_held(engine: Engine) -> None:
    answers = [ask(engine, PROMPTS[number], max_tokens=NEW) for number in range(8)]
    answers[0].got.append(answers[0].events.get(timeout=60))
    for answer in (*answers[:4], answers[6], answers[6]):
        engine.cancel(answer.id)
    engine.cancel("nobody")
    ends = [answer.end for answer in answers]
    assert all(isinstance(ends[number], Cancelled) for number in (0, 6))
    assert all(isinstance(ends[number], Finished) for number in (4, 5, 7))
    engine.cancel(answers[7].id)


def test_what_cannot_run_is_refused(runner: Runner, model: gpt_oss.GptOss) -> None:
    settings = dataclasses.replace(SETTINGS, queue_limit=3)
    with running(runner, model, settings=settings) as engine:
        with pytest.raises(TooLongError, match="at most 192, got 150 and 43"):
            ask(engine, [1] * 150, max_tokens=43)
        for prompt in ([], [128], [-1]):
            with pytest.raises(ValueError, match="token ids"):
                ask(engine, prompt)
        with pytest.raises(ValueError, match="token ids"):
            ask(engine, [1], logit_bias={500: 1.0})
        answers: list[Answer] = []

        def fill() -> None:
            for _ in range(100):
                answers.append(ask(engine, PROMPTS[0], max_tokens=NEW))

        with pytest.raises(QueueFullError, match="3 requests wait"):
            fill()
        params = SamplingParams(max_tokens=2)
        with pytest.raises(ValueError, match="id must be"):
            engine.submit(Request(id=answers[-1].id, prompt=[1], adapter=None, sampling=params), print)
        assert all(answer.tokens for answer in answers)


def test_drain_and_stop(runner: Runner, model: gpt_oss.GptOss, adapter: gpt_oss.LoraWeights) -> None:
    with running(runner, model) as engine:
        answers = [ask(engine, PROMPTS[number], max_tokens=NEW) for number in range(6)]
        assert engine.takes_requests
        assert not engine.drain(timeout=0)
        assert not engine.takes_requests
        with pytest.raises(EngineStoppedError, match="draining"):
            ask(engine, [1])
        assert engine.drain(timeout=120)
        assert all(len(answer.tokens) == NEW for answer in answers)
    with pytest.raises(EngineStoppedError):
        engine.load_adapter("late", adapter)
    engine.stop()
    runner.reset()
    engine = Engine(model, SETTINGS)
    with pytest.raises(EngineStoppedError, match="not started"):
        ask(engine, [1])
    assert engine.stats() == EngineStats()
    engine.stop()
    assert (engine.stats().pages_total, engine.stats().max_model_len) == (0, 0)
    with pytest.raises(EngineStoppedError, match="starts once, and this one is stopped"):
        engine._begin(runner, Pages(runner.geometry, caching=False))


def test_what_is_asked_of_an_engine_that_fails_ends(runner: Runner, model: gpt_oss.GptOss) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    runner.reset()
    engine = Engine(model, SETTINGS)
    engine._begin(runner, Pages(runner.geometry, caching=False))
    with engine._changed:
        first, second = engine._commands.add(fail), engine._commands.add(lambda: None)
    assert isinstance(first.exception(timeout=60), RuntimeError)
    assert isinstance(second.exception(timeout=60), EngineStoppedError)
    engine.stop()


def test_stop_fails_what_has_not_ended(runner: Runner, model: gpt_oss.GptOss) -> None:
    engines = running(runner, model)
    engine = engines.__enter__()
    answers = [ask(engine, PROMPTS[number], max_tokens=NEW) for number in range(6)]
    engine.stop()
    assert {answer.end for answer in answers if isinstance(answer.end, Failed)} == {Failed("the engine was stopped")}
    assert any(isinstance(answer.end, Failed) for answer in answers)


def test_an_engine_takes_a_model_without_adapters(model: gpt_oss.GptOss, adapter: gpt_oss.LoraWeights) -> None:
    with pytest.raises(ValueError, match="without adapters"):
        Engine(model.with_adapters(adapter), EngineSettings())
